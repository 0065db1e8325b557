#!/usr/bin/env bash
# All that a machine with a GPU can prove or measure, in one call of less than ten minutes; see benchmarks/run_gpu.py.
#
#   benchmarks/run_gpu.sh                 # results in runs/gpu/<card>, or in $OUT/<card>
#   benchmarks/run_gpu.sh --rehearse      # the same parts at tiny sizes on a machine without a GPU
#
# It needs torch, triton and einops, no network and no installation: the code runs from this folder. PYTHON names the
# interpreter; MOE_LAYER_PATH and CVMM_PATH say where the author's own kernels lie, to be compared with.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
[ -x "$(command -v "$python")" ] || python=python3
export PYTHONPATH="$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m benchmarks.run_gpu "$@"
