"""`pip install .` without extras, in a fresh environment: what works, and what the rest says of the extra it needs.

The environment sees torch, Triton, NumPy, pydantic and what these need, by links into this one, and nothing else. No
network is used.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

BASE = ("torch", "triton", "numpy", "pydantic")
EXTRAS = ("safetensors", "sklearn", "diffusers", "transformers", "accelerate", "peft", "nevergrad", "matplotlib", "PIL")
EXTRAS += ("skimage", "tqdm", "onnx", "onnxscript", "onnxruntime", "distributed")


def distributions(names):
    """The distributions of these names that are installed, and all that they need without extras."""
    found, wanted = {}, list(names)
    while wanted:
        name = re.sub(r"[-_.]+", "-", wanted.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # for another platform
            continue
        needs = [text for text in found[name].requires or () if "extra ==" not in text]
        wanted += [re.match(r"[\w.-]+", text).group() for text in needs]
    return found.values()


@pytest.fixture(scope="module")
def fresh(wheel, tmp_path_factory):
    """The Python of a fresh environment with the wheel and its base dependencies."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    for distribution in distributions(BASE):
        for name in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            link = site / name
            if not link.exists():
                link.symlink_to(Path(str(distribution.locate_file(name))))
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    return python


def call(fresh, cwd, *arguments):
    """Exit code, stdout and stderr of Python in the fresh environment."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(cwd / "inductor")
    done = subprocess.run(
        [str(fresh), *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


def command(fresh, cwd, *arguments):
    """The same of the command `dynamicrad`, as it is installed."""
    return call(fresh, cwd, str(fresh.parent / "dynamicrad"), *arguments)


def test_no_extra_is_there(fresh, tmp_path):
    code = f"import importlib.util, json; print(json.dumps([n for n in {EXTRAS} if importlib.util.find_spec(n)]))"
    assert call(fresh, tmp_path, "-c", code)[:2] == (0, "[]\n")


def test_import_and_attention(fresh, tmp_path):
    code = """
import json, torch
import dynamicrad_compile as drad
plan = drad.make_plan("dynamicrad", grid=(3, 4, 5), block_size=16)
q = torch.randn(1, 2, 60, 8)
print(json.dumps([drad.__file__, list(drad.block_sparse_attention(q, q, q, plan).shape)]))
"""
    status, out, err = call(fresh, tmp_path, "-c", code)
    assert status == 0, err
    file, shape = json.loads(out)
    assert Path(file).is_relative_to(fresh.parents[1])
    assert shape == [1, 2, 60, 8]


def test_backend_by_name_and_explain(fresh, tmp_path):
    """In a process that never imports the package before torch.compile asks for it."""
    (tmp_path / "script.py").write_text("""
import torch

class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = torch.nn.Linear(16, 48)

    def forward(self, video):
        x = video.flatten(2).transpose(1, 2)
        q, k, v = self.proj(x).view(1, -1, 3, 2, 8).permute(2, 0, 3, 1, 4)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).sum()

model, video = Attention(), torch.randn(1, 16, 4, 8, 8)
options = {"min_tokens": 0, "block_size": 16, "grid": (4, 8, 8), "strict": True}
with torch.no_grad():
    sparse = torch.compile(model, backend="dynamicrad", options=options)
    assert sparse(video).isfinite()
    import dynamicrad_compile as drad
    assert len(drad.report(sparse).replaced) == 1
    report = drad.explain(model, video, options=options)
print(report.summary())
""")
    status, out, err = call(fresh, tmp_path, "script.py")
    assert status == 0, err
    assert "4x8x8" in out


def test_doctor(fresh, tmp_path):
    status, out, err = command(fresh, tmp_path, "doctor")
    assert status == 0, out + err
    assert "fail" not in out
    assert "pip install 'pillow>=10'" in out
    assert "pip install 'diffusers>=0.35' 'transformers>=4.50' 'accelerate>=1.0' 'ftfy>=6'" in out


def test_plot_to_text(fresh, tmp_path):
    status, out, err = command(fresh, tmp_path, "plot", "--grid", "3", "8", "8", "--block-size", "16")
    assert status == 0, err
    assert "#" in out
    assert "pillow is missing" in err


def test_models_by_name_are_listed(fresh, tmp_path):
    status, out, err = command(fresh, tmp_path, "explain", "--model", "list")
    assert status == 0, err
    assert "wan-1.3b" in out


NEEDS = {
    "explain": ("diffusers", "diffusers>=0.35", ["--model", "wan-1.3b"]),
    "plot": ("pillow", "pillow>=10", ["--grid", "3", "8", "8", "-o", "mask.png"]),
    "tune": ("nevergrad", "nevergrad>=1.0.5", ["--grid", "3", "4", "4", "--block-size", "16"]),
    "eval": ("tqdm", "scikit-image>=0.24", []),
    "record": ("tqdm", "tqdm>=4.66", ["--regime", "low", "-o", "x.safetensors", "--prompt", "a prompt"]),
}


@pytest.mark.parametrize("name", NEEDS)
def test_the_rest_says_what_to_install(fresh, tmp_path, name):
    package, requirement, arguments = NEEDS[name]
    status, out, err = command(fresh, tmp_path, name, *arguments)
    assert (status, out) == (2, ""), err
    assert "Traceback" not in err
    assert package in err
    assert "pip install '" in err
    assert f"'{requirement}'" in err
