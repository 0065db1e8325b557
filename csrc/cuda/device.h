// device.h - the few things of CUDA that the kernels use: storage types, tensor-core products, a warp's sum, launches.
// emulated.h gives the same names on the CPU.
#pragma once
#include <cstdint>

#include "../include/sparse_ffn_cuda.h"
#include "tiles.h"

#if defined(SPARSE_FFN_CUDA_EMULATED)
#include "emulated.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <mma.h>

namespace sparse_ffn_cuda {

namespace wmma = nvcuda::wmma;
using bf16 = __nv_bfloat16;
using fp16 = __half;
constexpr int64_t kMaxBlocks = 0x7fffffff;

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(bf16 v) { return __bfloat162float(v); }
__device__ inline float to_float(fp16 v) { return __half2float(v); }
__device__ inline void from_float(float v, float& out) { out = v; }
__device__ inline void from_float(float v, bf16& out) { out = __float2bfloat16(v); }
__device__ inline void from_float(float v, fp16& out) { out = __float2half(v); }

template <class Fragment> __device__ inline void round_to_tf32(Fragment& f) {
#pragma unroll
  for (int i = 0; i < f.num_elements; i++) f.x[i] = wmma::__float_to_tf32(f.x[i]);
}

__device__ inline float warp_sum(float v) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
  return v;
}

template <class Arguments>
inline cudaError_t launch(void (*kernel)(Arguments), int64_t blocks, void* stream, const Arguments& arguments) {
  if (blocks <= 0) return cudaSuccess;
  const unsigned grid = static_cast<unsigned>(lesser(blocks, kMaxBlocks));
  kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(arguments);
  return cudaGetLastError();
}

}  // namespace sparse_ffn_cuda
#endif

namespace sparse_ffn_cuda {

// W numbers that are read and written in as few instructions as their address allows; `left` of them exist.
template <class T, int W> struct alignas(W * sizeof(T) < 16 ? W * sizeof(T) : 16) Run {
  T v[W];
};
template <class T, int W> __device__ inline bool whole(const T* at, int64_t left) {
  return left >= W && reinterpret_cast<uintptr_t>(at) % alignof(Run<T, W>) == 0;
}
template <class T, int W> __device__ inline void store_run(T* to, const Run<float, W>& from, int64_t left) {
  Run<T, W> narrow;
#pragma unroll
  for (int i = 0; i < W; i++) from_float(from.v[i], narrow.v[i]);
  if (whole<T, W>(to, left)) {
    *reinterpret_cast<Run<T, W>*>(to) = narrow;
  } else {
#pragma unroll
    for (int i = 0; i < W; i++)
      if (i < left) to[i] = narrow.v[i];
  }
}
template <class T, int W> __device__ inline Run<T, W> load_run(const T* from, int64_t left) {
  if (whole<T, W>(from, left)) return *reinterpret_cast<const Run<T, W>*>(from);
  Run<T, W> run{};
#pragma unroll
  for (int i = 0; i < W; i++)
    if (i < left) run.v[i] = from[i];
  return run;
}

}  // namespace sparse_ffn_cuda
