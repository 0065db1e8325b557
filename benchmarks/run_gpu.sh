#!/usr/bin/env bash
# A card's proof and numbers, in three calls of at most nine minutes each; see benchmarks/run_gpu.py.
#
#   benchmarks/run_gpu.sh tests             # everything that is tested, on the card
#   benchmarks/run_gpu.sh bench             # times, beside dense networks and the libraries in runs/gpu-peers
#   benchmarks/run_gpu.sh tune              # block sizes and crossovers, and the layers with them
#   benchmarks/run_gpu.sh tests --rehearse  # the same parts at tiny sizes on a machine without a GPU; so for each stage
#
# Made once more, a call goes on where it stopped; --archive FILE goes on with what another machine has brought home.
# Results lie in runs/gpu/<card>-<code>; at most eight files to carry away in runs/gpu/out, or in $OUT.
#
# It needs torch, triton, einops and pytest, no network and no installation: the code runs from this folder. PYTHON names
# the interpreter. benchmarks/fetch_gpu_peers.sh prepares the libraries to compare with, on a machine with a network.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
[ -x "$(command -v "$python")" ] || python=python3
export PYTHONPATH="$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m benchmarks.run_gpu "$@"
