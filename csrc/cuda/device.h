// device.h - the few things of CUDA that the kernels use: storage types, asynchronous copies, tensor-core products, a
// warp's sum, and launches. emulated.h gives the same names on the CPU.
#pragma once
#include <cstdint>

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

// Copies `bytes` (0..16) to shared memory, filled up to 16 with zeros; past L1, which gathered rows would only thrash.
__device__ inline void copy_async(void* shared, const void* global, int bytes) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address), "l"(global), "r"(bytes) : "memory");
}
__device__ inline void close_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
template <int LATEST> __device__ inline void wait_for_copies() {  // for all groups but the latest ones
  asm volatile("cp.async.wait_group %0;\n" ::"n"(LATEST) : "memory");
}

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

// W numbers that are written in as few instructions as their alignment allows.
template <class T, int W> struct alignas(W * sizeof(T) < 16 ? W * sizeof(T) : 16) Run {
  T v[W];
};
template <class T, int W>
__device__ inline void store_run(T* to, const Run<float, W>& from, int64_t left, bool aligned) {
  Run<T, W> narrow;
#pragma unroll
  for (int i = 0; i < W; i++) from_float(from.v[i], narrow.v[i]);
  if (aligned && left >= W) {
    *reinterpret_cast<Run<T, W>*>(to) = narrow;
  } else {
#pragma unroll
    for (int i = 0; i < W; i++)
      if (i < left) to[i] = narrow.v[i];
  }
}
template <class T, int W> __device__ inline Run<T, W> load_run(const T* from, int64_t left, bool aligned) {
  Run<T, W> run;
  if (aligned && left >= W) return *reinterpret_cast<const Run<T, W>*>(from);
#pragma unroll
  for (int i = 0; i < W; i++) {
    if (i < left) run.v[i] = from[i];
    else from_float(0.0f, run.v[i]);
  }
  return run;
}

// Whether rows at this pointer and stride can be read and written 16 bytes at a time.
template <class T> inline bool aligned16(const T* pointer, int64_t stride) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && stride * static_cast<int64_t>(sizeof(T)) % 16 == 0;
}

}  // namespace sparse_ffn_cuda
