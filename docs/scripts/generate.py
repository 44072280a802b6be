"""Write the pages of docs/ that are made from the source; a test checks that they are current.

python docs/scripts/generate.py
"""

from __future__ import annotations

import attention_page
import how_picture
import options_page
import reasons_page

PAGES = {module.PAGE: module.page for module in (options_page, reasons_page, attention_page, how_picture)}
"""Each page, and the function that gives its text."""


def main() -> None:
    """Write all of them."""
    for path, page in PAGES.items():
        path.write_text(page(), encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
