#!/usr/bin/env bash
# The first thing to run on a GPU: every form of the kernels built, checked and timed in at most 450 s, results after
# every row in ${OUT:-benchmarks/results}, a table of at most 60 lines last. Arguments go to gpu_day.py (--help).
#
#   bash benchmarks/gpu_day.sh                                  # on a GPU
#   bash benchmarks/gpu_day.sh --resume benchmarks/results/NAME.json    # what the first run had no time for
#   bash benchmarks/gpu_day.sh --device cpu --reduced           # the plumbing, without one
#   bash benchmarks/gpu_day.sh --device cpu --only build        # the builds for sm_90, without one
#
# It needs Python 3.10 or newer with torch >= 2.11, triton >= 3.6 and numpy >= 1.26. Where pydantic is missing and there
# is no network, bring these wheels (Python 3.12, x86-64), 2.8 MB together:
#
#   pydantic 2.14.4           0.49 MB    pydantic-core 2.50.5      2.26 MB    (the version that this pydantic asks for)
#   annotated-types 0.8.0     0.01 MB    typing-inspection 0.4.5   0.01 MB    typing-extensions 4.16.0   0.05 MB
#
#   pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux2014_x86_64 -d wheels \
#       pydantic==2.14.4 pydantic-core==2.50.5 annotated-types==0.8.0 typing-inspection==0.4.5 typing-extensions==4.16.0
#   pip install --no-index --no-deps --target site wheels/*.whl && export PYTHONPATH=$PWD/site
set -u
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# Asking whether there is a GPU must not start CUDA in a process that is to be forked.
export PYTORCH_NVML_BASED_CUDA_CHECK=1

"$PYTHON" - <<'CHECK' || exit 1
import importlib.util as found, sys
names = ["torch", "triton", "numpy", "pydantic", "pydantic_core", "annotated_types", "typing_inspection"]
names += ["tomli"] * (sys.version_info < (3, 11))
missing = [name for name in names if found.find_spec(name) is None]
if sys.version_info < (3, 10) or missing:
    sys.exit(f"gpu_day.sh: Python {sys.version.split()[0]} lacks {', '.join(missing) or 'nothing, but is too old'}; "
             "benchmarks/gpu_day.sh says at its top which wheels to bring")
CHECK

timeout --signal=TERM --kill-after=10 440 "$PYTHON" benchmarks/gpu_day.py --output "${OUT:-benchmarks/results}" "$@"
