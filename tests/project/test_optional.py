"""What is said of a missing library: the requirements of this package that are missing, not an extra of an index."""

from __future__ import annotations

import importlib.metadata
import shlex

import pytest

from dynamicrad_compile import DynamicRadError
from dynamicrad_compile import optional as lib

DECLARED = [
    "torch>=2.11",
    'pillow>=10; extra == "plot"',
    "no-such-a<3,>=1; extra == 'much'",
    'No_Such.B>=2; python_version > "3" and extra == "much"',
    'dynamicrad-compile[plot,more]; extra == "much"',
    'no-such-c>=1; extra == "more"',
]


@pytest.fixture
def declared(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: DECLARED)


CASES = {
    ("plot", "PIL"): ["pillow>=10"],  # it is here, but could not be imported
    ("much",): ["no-such-a<3,>=1", "No_Such.B>=2", "no-such-c>=1"],
    ("much", "no_such_b", "sklearn"): ["no-such-a<3,>=1", "No_Such.B>=2", "no-such-c>=1", "scikit-learn"],
}


@pytest.mark.parametrize("arguments", CASES)
def test_command(declared, arguments):
    assert shlex.split(lib.install(*arguments)) == ["pip", "install", *CASES[arguments]]


def test_message(declared):
    with pytest.raises(DynamicRadError, match=r"^tests need no_such_module: pip install 'no-such-a<3,>=1' .*\.$"):
        lib.optional("no_such_module.part", "tests need", "much")


def test_package_that_is_not_installed(monkeypatch):
    def requires(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    assert lib.install("eval", "skimage", "tqdm") == "pip install scikit-image tqdm"


def test_every_extra_has_requirements():
    for extra in importlib.metadata.metadata(lib.OURS).get_all("Provides-Extra"):
        assert list(lib._requirements(extra)), extra
