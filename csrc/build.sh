#!/usr/bin/env bash
# Builds the native libraries without pip and without a network: csrc/build.sh [--dry-run] FOLDER
#
# Into FOLDER go libsparse_ffn_cpu.so and, where nvcc is, libsparse_ffn_cuda.so. They are found through
#   export SPARSE_FFN_LIBRARY=FOLDER/libsparse_ffn_cpu.so SPARSE_FFN_CUDA_LIBRARY=FOLDER/libsparse_ffn_cuda.so
# With cmake it does as an installation does; without it calls the compilers itself.
set -euo pipefail
dry=""
if [ "${1:-}" = --dry-run ]; then
  dry=1
  shift
fi
run() { if [ -n "$dry" ]; then echo "$*"; else "$@"; fi; }
out=${1:?usage: csrc/build.sh [--dry-run] FOLDER}
here=$(cd "$(dirname "$0")" && pwd)
jobs=$(nproc 2>/dev/null || echo 2)
cxx=${CXX:-$(command -v g++ || command -v clang++ || true)}
nvcc=${CUDACXX:-$(command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null || true)}
[ -n "$cxx" ] || { echo "no C++ compiler here" >&2; exit 3; }
mkdir -p "$out"
out=$(cd "$out" && pwd)

if command -v cmake >/dev/null && [ -z "${SPARSE_FFN_NO_CMAKE:-}" ]; then
  with_cuda=OFF
  [ -z "$nvcc" ] || with_cuda=ON
  CUDACXX=$nvcc run cmake -S "$here" -B "$out/cmake" -DCMAKE_BUILD_TYPE=Release -DSPARSE_FFN_CUDA=$with_cuda \
    -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$out"
  run cmake --build "$out/cmake" --parallel "$jobs"
  exit
fi

# as in CMakeLists.txt: the core once for each instruction set, what chooses between them once
flags="-std=c++17 -O3 -fPIC -fvisibility=hidden -fvisibility-inlines-hidden -fno-math-errno -fno-exceptions -fno-rtti"
flags="$flags -fopenmp -I$here/include"
names="generic" x86=""
if [ "$(uname -m)" = x86_64 ]; then
  names="generic avx2 avx512 avx512_bf16" x86="-DSPARSE_FFN_X86=1"
fi
avx2="-mavx2 -mfma -mf16c"
avx512="$avx2 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512"
{
  for base in dispatch scratch; do echo "$x86 -c $here/cpu/$base.cpp -o $out/$base.o"; done
  for source in "$here"/interface/*.cpp; do echo "-c $source -o $out/interface-$(basename "$source" .cpp).o"; done
  for name in $names; do
    case $name in
      generic) wide="" ;; avx2) wide=$avx2 ;; avx512) wide=$avx512 ;; avx512_bf16) wide="$avx512 -mavx512bf16" ;;
    esac
    for source in "$here"/cpu/*.cpp; do
      base=$(basename "$source" .cpp)
      case $base in dispatch | scratch) continue ;; esac
      echo "$wide -DSPARSE_FFN_ISA_NAME=$name -c $source -o $out/$name-$base.o"
    done
  done
} >"$out/commands"
if [ -n "$dry" ]; then
  sed "s|^|$cxx $flags |" "$out/commands"
else
  sed "s|^|$flags |" "$out/commands" | tr '\n' '\0' | xargs -0 -P "$jobs" -I{} sh -c "$cxx {}"
fi
run "$cxx" -shared -fopenmp -Wl,--no-undefined -o "$out/libsparse_ffn_cpu.so" "$out"/*.o
if [ -n "$nvcc" ]; then
  run "$nvcc" -std=c++17 -O3 -shared -cudart static -Xcompiler -fPIC,-fvisibility=hidden -I"$here/include" \
    -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90 -gencode arch=compute_90,code=compute_90 \
    -o "$out/libsparse_ffn_cuda.so" "$here"/cuda/{api,grouped,outer,sums}.cu
fi
