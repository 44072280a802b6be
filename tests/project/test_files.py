"""Files are written whole or not at all, and what is written as TOML is read back."""

from __future__ import annotations

import datetime

import numpy as np
import pytest

from dynamicrad_compile.files import to_toml, tomllib, whole_file, whole_folder, write_file

TABLES = {
    "text": 'a "quoted" \\ back\nslash, é, \x7f',
    "numbers": [1, 1.5, -0.0, 1e-30, 1e22, float("inf")],
    "truth": True,
    "day": datetime.date(2026, 2, 3),
    "a key": {"with space": 1, "deep": {"er": {"x": [["a"], []]}}},
    "empty": {},
    "rows": [{"a": 1, "b": {"c": 2}}, {"a": 3}],
    "mixed": [{"a": 1}, 2],
}


def test_toml_is_read_back():
    assert tomllib.loads(to_toml(TABLES)) == TABLES


def test_toml_of_numpy_numbers():
    assert tomllib.loads(to_toml({"a": np.int64(3), "b": np.float64(0.5)})) == {"a": 3, "b": 0.5}


def test_what_toml_lacks():
    with pytest.raises(TypeError, match="TOML has no NoneType"):
        to_toml({"a": None})


def test_file_is_replaced_or_kept(tmp_path):
    file = tmp_path / "new" / "file.txt"
    write_file(file, "first é")
    with pytest.raises(ZeroDivisionError), whole_file(file) as partial:
        partial.write_text(f"half {1 / 0}")
    assert file.read_text(encoding="utf-8") == "first é"
    write_file(file, b"second")
    assert file.read_bytes() == b"second"
    assert list(file.parent.iterdir()) == [file]


def test_folder_is_replaced_or_kept(tmp_path):
    folder = tmp_path / "out" / "model"
    with pytest.raises(ZeroDivisionError), whole_folder(folder) as temporary:
        (temporary / "a").write_text(f"half {1 / 0}")
    assert not list(tmp_path.iterdir())
    with whole_folder(folder, last=(".z",)) as temporary:
        (temporary / "a").write_text("whole")
    assert [file.name for file in folder.iterdir()] == ["a"]
    assert list(folder.parent.iterdir()) == [folder]
