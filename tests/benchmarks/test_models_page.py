"""docs/models.md is what the rows of the zoo say, and every case of the zoo has a name."""

from __future__ import annotations

import json

import models_page
import zoo_table

from dynamicrad_compile.files import tomllib


def rows():
    return json.loads(models_page.ROWS.read_text(encoding="utf-8"))


def test_every_case_has_a_name_and_a_row():
    names = tomllib.loads(models_page.NAMES.read_text(encoding="utf-8"))
    assert {name for group in names.values() for name in group} == set(zoo_table.CASES)
    assert {row["name"] for row in rows()["rows"]} == set(zoo_table.CASES)


def test_the_page_is_written_from_the_rows():
    assert models_page.PAGE.read_text(encoding="utf-8") == models_page.page(rows())


def test_no_row_is_wrong():
    for row in rows()["rows"]:
        assert not row["failure"], row
        assert row["grid_right"] is not False, row
        assert row["full_error"] is None or row["full_error"] < 1e-4, row
        assert row["sparse_error"] is None or row["sparse_error"] < 1e-4, row
        assert "WRONG" not in row["by_blocks"], row
        assert row["replaced"] == row["expected"] or row["reasons"], row
