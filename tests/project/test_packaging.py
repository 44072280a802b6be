"""What is installed and what an import does: no GPU, no heavy modules, one clean namespace, any working directory."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import pytest

import dynamicrad_compile as drad

ROOT = Path(__file__).parents[2]


def python(code, cwd):
    """JSON that a fresh interpreter prints as its last line."""
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_import_is_lean(tmp_path):
    """Beside what torch loads itself, the base dependencies and nothing else; not even Dynamo and Inductor."""
    code = """
import json, sys
import torch
before = set(sys.modules)
import dynamicrad_compile
new = {name for name in sys.modules if name not in before}
base = "dynamicrad_compile torch triton numpy pydantic pydantic_core annotated_types typing_inspection".split()
foreign = {name.split(".")[0] for name in new} - {*base} - set(sys.stdlib_module_names)
foreign = {name for name in foreign if not name.startswith("_")}
heavy = [name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in new]
print(json.dumps([sorted(foreign), heavy, torch.cuda.is_initialized()]))
"""
    assert python(code, tmp_path) == [[], [], False]


def test_import_registers_the_ops(tmp_path):
    """Saved programs need them, and the compile caches of PyTorch the kernels behind them."""
    code = """
import json
import dynamicrad_compile
import torch
names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("dynamicrad::")]
kernels = torch._library.triton.triton_ops_to_kernels
print(json.dumps([len(names), {name: len(kernels[name]) for name in names if name in kernels}]))
"""
    count, kernels = python(code, tmp_path)
    assert count >= 13
    assert {"dynamicrad::block_sparse_attention", "dynamicrad::select_blocks_"} <= set(kernels)
    assert all(kernels.values())


def test_public_names_load_at_first_use():
    assert set(drad.__all__) <= set(dir(drad))
    for name in drad.__all__:
        assert not isinstance(getattr(drad, name), types.ModuleType), name
    with pytest.raises(AttributeError, match="no attribute 'tuna'"):
        drad.tuna  # noqa: B018


def test_profiles_import_no_torch(tmp_path):
    # The package itself imports torch, so the folder is imported under another parent.
    code = f"""
import importlib, json, sys, types
for name in ("dynamicrad_compile",):
    parent = types.ModuleType(name)
    parent.__path__ = [{str(ROOT / "dynamicrad_compile")!r}]
    sys.modules[name] = parent
profiles = importlib.import_module("dynamicrad_compile.profiles")
print(json.dumps([profiles.list_profiles() != [], "torch" in sys.modules]))
"""
    assert python(code, tmp_path) == [True, False]


def test_backend_by_name_without_importing_us(tmp_path):
    code = """
import json, torch
compiled = torch.compile(lambda x: x + 1, backend="dynamicrad", options={"inner": "eager"})
print(json.dumps(compiled(torch.zeros(2)).tolist()))
"""
    assert python(code, tmp_path) == [1.0, 1.0]


def test_no_top_level_kernels_package():
    """With the repository on sys.path, as `python -c` puts it, our folder is not the package `kernels`."""
    code = """
import importlib.util, json
spec = importlib.util.find_spec("kernels")
print(json.dumps("" if spec is None else spec.origin or ""))
"""
    assert not python(code, ROOT).startswith(str(ROOT / "kernels"))


@pytest.mark.slow
def test_diffusers_does_not_take_our_folder_for_kernels():
    """diffusers and transformers probe for that package when a pipeline is imported."""
    code = """
import json
from diffusers import WanPipeline
print(json.dumps(WanPipeline.__name__))
"""
    assert python(code, ROOT) == "WanPipeline"


def test_entry_points():
    (backend,) = importlib.metadata.entry_points(group="torch_dynamo_backends", name="dynamicrad")
    assert backend.load().__module__ == "dynamicrad_compile.backend"
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="dynamicrad")
    assert script.load().__module__ == "dynamicrad_compile.cli"


def walk(folder):
    """All files in a folder, those behind links too."""
    for file in folder.iterdir():
        if file.is_dir():
            yield from walk(file)
        else:
            yield file


def test_sdist_content(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "pyproject.toml", "PKG-INFO"} <= names
    assert not [name for name in names if "test" in name or name.endswith(".pyc")]


def test_twine_finds_nothing_wrong(sdist, wheel):
    command = [sys.executable, "-m", "twine", "check", "--strict", str(sdist), str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_wheel_is_the_tree(wheel):
    """Built from the source distribution, it has each file of the package as it is here, byte for byte."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if not name.split("/")[0].endswith(".dist-info"):
                assert archive.read(name) == (ROOT / name).read_bytes(), name


def test_wheel_content(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names} == {"dynamicrad_compile", f"{wheel.name.split('-py3')[0]}.dist-info"}
    package = ROOT / "dynamicrad_compile"
    sources = {file.relative_to(ROOT).as_posix() for file in walk(package) if file.suffix == ".py"}
    assert len(sources) > 150
    assert sources <= set(names), "a folder that [tool.setuptools] packages does not list"
    profiles = {f"dynamicrad_compile/profiles/{file.name}" for file in (ROOT / "profiles").glob("*.toml")}
    assert profiles <= set(names)
    assert {"dynamicrad_compile/py.typed", "dynamicrad_compile/plans/crossover.toml"} <= set(names)
    assert "dynamicrad_compile/quality/tiny_video/checkpoint/model.safetensors" in names
    assert not [name for name in names if "test" in name or name.endswith(".pyc")]


def test_wheel_works_on_its_own(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = f"""
import json, sys
sys.path.insert(0, {str(tmp_path / "site")!r})
import dynamicrad_compile as drad, torch
plan = drad.make_plan("dynamicrad", grid=(3, 4, 5), block_size=16, profile="default")
q = torch.randn(1, 2, 60, 8)
print(json.dumps([drad.__file__, list(drad.block_sparse_attention(q, q, q, plan).shape)]))
"""
    file, shape = python(code, tmp_path)
    assert Path(file).is_relative_to(tmp_path)
    assert shape == [1, 2, 60, 8]


@pytest.mark.slow
def test_eval_from_the_wheel(wheel, tmp_path):
    """The default subject is in the wheel: nothing of the repository is needed."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = f"""
import json, sys
sys.path.insert(0, {str(tmp_path / "site")!r})
from dynamicrad_compile import cli
few = ["--prompts", "1", "--steps", "2", "--real", "0", "--methods", "static_ratio", "--sparsity", "0.7", "-o", "out"]
code = cli.main(["eval", *few])
print(json.dumps([cli.__file__, code]))
"""
    file, code = python(code, tmp_path)
    assert Path(file).is_relative_to(tmp_path)
    assert code == 0
    rows = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))["rows"]
    assert [row["method"].split()[0] for row in rows][:1] == ["dense"]
    assert (tmp_path / "out" / "clips.gif").stat().st_size > 0
