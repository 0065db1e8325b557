#!/usr/bin/env bash
# Fetches the libraries that benchmarks/run_gpu.sh compares with, each in a pinned state, from GitHub and PyPI.
#
#   benchmarks/fetch_gpu_peers.sh          # into runs/gpu-peers
#
# It needs git, pip and a network, and no GPU: all of them are pure Python, so that the folder can be copied to the
# machine that has the card. What is there in its pinned state already stays. versions.txt says what was fetched.
# SonicMoE needs packages that are not fetched (quack-kernels, nvidia-cutlass-dsl): it takes part where they are installed.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
[ -x "$(command -v "$python")" ] || python=python3
folder=runs/gpu-peers
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
touch "$folder/versions.txt"

fetched() {  # fetched NAME VERSION: whether it is there
  grep -qxF "$1 $2" "$folder/versions.txt"
}

note() {  # note NAME VERSION
  { grep -v "^$1 " "$folder/versions.txt" || true; echo "$1 $2"; } | sort >"$folder/versions.new"
  mv "$folder/versions.new" "$folder/versions.txt"
}

repository() {  # repository PACKAGE OWNER/NAME COMMIT FOLDER [FILE...]: what becomes the package
  fetched "$1" "$3" && return
  local clone
  clone=$(mktemp -d)
  git -C "$clone" init --quiet
  git -C "$clone" fetch --quiet --depth 1 "https://github.com/$2" "$3"
  rm -rf "${folder:?}/$1"
  mkdir "$folder/$1"
  git -C "$clone" archive "FETCH_HEAD:$4" "${@:5}" | tar -x -C "$folder/$1"
  rm -rf "$clone"
  note "$1" "$3"
}

wheel() {  # wheel PACKAGE VERSION
  fetched "$1" "$2" && return
  # it is the card's Python that must be new enough, not this one
  local where=(--ignore-requires-python --only-binary=:all: --target "$folder")
  "$python" -m pip install --quiet --no-deps --no-compile --upgrade "${where[@]}" "$1==$2"
  note "$1" "$2"
}

repository scattermoe shawntan/scattermoe 47b5e1502e5a10e82c8e5945d761b877849871e7 scattermoe
repository moe_layer RobertCsordas/moe_layer c9b9c01c7071fe5c39d1f91ae6f24911fb75adb0 triton_src/moe_layer
repository cvmm_codex RobertCsordas/cvmm_codex d43cedc9a412527d0dec5dac419c2421d7683bcf "" cvmm.py
# both register the same operators, and one process is to hold both
sed -i 's/\bmylib\b/cvmm_codex/g' "$folder/cvmm_codex/cvmm.py"
wheel liger-kernel 0.8.5
wheel sonic-moe 0.1.2.post1
cat "$folder/versions.txt"
