#!/usr/bin/env bash
# Builds the libraries without pip and without a network.
#
# Into FOLDER go libsparse_ffn_cpu.so and, where nvcc is, libsparse_ffn_cuda.so. They are found through
#   export SPARSE_FFN_LIBRARY=FOLDER/libsparse_ffn_cpu.so SPARSE_FFN_CUDA_LIBRARY=FOLDER/libsparse_ffn_cuda.so
# With cmake it does as an installation does; without it (or with SPARSE_FFN_NO_CMAKE=1) calls the compilers itself, with
# CXXFLAGS after its own, and with SPARSE_FFN_ISAS=generic no code for wider vectors (tests only). SPARSE_FFN_CUDA=0 leaves
# out the CUDA kernels, SPARSE_FFN_CPU=0 the CPU core.
set -euo pipefail
usage="usage: csrc/build.sh [--dry-run] FOLDER"
dry=""
if [ "${1:-}" = --dry-run ]; then
  dry=1
  shift
fi
case ${1:-} in
  -h | --help) echo "$usage" && sed -n '/^# Builds/,/^[^#]/s/^# \{0,1\}//p' "$0" && exit ;;
  "" | -*) echo "$usage" >&2 && exit 2 ;;
esac
isas=${SPARSE_FFN_ISAS:-all}
case $isas in
  all | generic) ;;
  *) echo "SPARSE_FFN_ISAS must be all or generic, got $isas" >&2 && exit 2 ;;
esac
run() { if [ -n "$dry" ]; then echo "$*"; else "$@"; fi; }
out=$1
here=$(cd "$(dirname "$0")" && pwd)
jobs=$(nproc 2>/dev/null || echo 2)
cxx=${CXX:-$(command -v g++ || command -v clang++ || true)}
nvcc=${CUDACXX:-$(command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null || true)}
if [ "${SPARSE_FFN_CUDA:-}" = 0 ]; then nvcc=""; fi
cpu=${SPARSE_FFN_CPU:-1}
[ -n "$cxx" ] || { echo "no C++ compiler here" >&2; exit 3; }
mkdir -p "$out"
out=$(cd "$out" && pwd)
if [ -z "$nvcc" ] && [ "$cpu" = 0 ]; then echo "nothing to build: no nvcc here" && exit; fi

if command -v cmake >/dev/null && [ -z "${SPARSE_FFN_NO_CMAKE:-}" ]; then
  with_cuda=OFF target=all
  # CMake leaves the kernels out, with a warning, where it cannot use the compiler: an old library would hide that
  if [ -n "$nvcc" ]; then with_cuda=ON && run rm -f "$out/libsparse_ffn_cuda.so"; fi
  [ "$cpu" != 0 ] || target=sparse_ffn_cuda
  if ! command -v make >/dev/null && command -v ninja >/dev/null; then export CMAKE_GENERATOR=Ninja; fi
  CUDACXX=$nvcc run cmake -S "$here" -B "$out/cmake" -DCMAKE_BUILD_TYPE=Release -DSPARSE_FFN_CUDA=$with_cuda \
    -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$out"
  run cmake --build "$out/cmake" --parallel "$jobs" --target $target
  if [ -n "$nvcc" ] && [ -z "$dry" ] && [ ! -f "$out/libsparse_ffn_cuda.so" ]; then echo "$nvcc built nothing" >&2 && exit 1; fi
  echo "built in $SECONDS s on $jobs processors" >&2
  exit
fi

# Sources, instruction sets and flags are those of CMakeLists.txt.
values() {  # of set(NAME VALUES) in a CMakeLists.txt, on however many lines; the last if there are several
  tr '\n' ' ' <"$here/$1" | grep -o "set($2 [^)]*)" | tail -n1 | sed "s/^set($2 *//; s/ *)\$//"
}
flags="-std=c++17 -O2 -fPIC -fvisibility=hidden -fvisibility-inlines-hidden -fopenmp $(values CMakeLists.txt warnings)"
names=generic flags_generic="" flags_neon="" x86=""
if [ "$(uname -m)" = aarch64 ] || [ "$(uname -m)" = arm64 ]; then names=neon; fi
if [ "$(uname -m)" = x86_64 ] && [ "$isas" = all ]; then
  names=$(values CMakeLists.txt isas) x86="-DSPARSE_FFN_X86=1"
  if echo 'asm("tdpbf16ps %tmm2, %tmm1, %tmm0");' | $cxx -x c++ -c -o /dev/null - 2>/dev/null; then
    x86="$x86 -DSPARSE_FFN_HAS_AMX=1"
  else
    names=${names/ amx/}
  fi
  for name in $names; do
    eval "flags_$name=\"$(values CMakeLists.txt "flags_$name")\""
  done
fi
commands=() objects=()
compile() {  # compile SOURCE OBJECT FLAGS...
  objects+=("$out/$2.o")
  commands+=("$(printf '%q ' $cxx $flags "${@:3}" ${CXXFLAGS:-} -I"$here/include" -c "$here/$1" -o "$out/$2.o")")
}
build_core() {
  local source name own
  for source in $(values CMakeLists.txt once); do
    compile "$source" "$(basename "$source" .cpp)" $x86
  done
  for name in $names; do
    own=flags_$name
    for source in $(values CMakeLists.txt core); do
      compile "$source" "$name-$(basename "$source" .cpp)" ${!own} "-DSPARSE_FFN_ISA_NAME=$name"
    done
  done
  if [ -n "$dry" ]; then
    printf '%s\n' "${commands[@]}"
  else
    printf '%s\0' "${commands[@]}" | xargs -0 -P "$jobs" -n 1 sh -c
  fi
  run $cxx -shared -fopenmp -Wl,--no-undefined -o "$out/libsparse_ffn_cpu.so" "${objects[@]}"
}
if [ "$cpu" != 0 ]; then build_core; fi
if [ -n "$nvcc" ]; then
  cd "$here/cuda"
  run "$nvcc" -std=c++17 -O3 --threads 0 -shared -cudart static -Xcompiler -fPIC,-fvisibility=hidden -I"$here/include" \
    -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90 -gencode arch=compute_90,code=compute_90 \
    -o "$out/libsparse_ffn_cuda.so" $(values cuda/CMakeLists.txt kernels)
fi
echo "built in $SECONDS s on $jobs processors" >&2
