"""Write the pages of docs/ that are made from the source; a test checks that they are current.

python docs/scripts/generate.py
"""

from __future__ import annotations

import options_page
import reasons_page

PAGES = {module.PAGE: module.page for module in (options_page, reasons_page)}
"""Each page, and the function that gives its text."""


def main() -> None:
    """Write all of them."""
    for path, page in PAGES.items():
        path.write_text(page(), encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
