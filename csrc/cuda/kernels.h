// kernels.h - the kernels' arguments and the functions that launch them.
#pragma once
#include "pipeline.h"

namespace sparse_ffn_cuda {

// Kernels of independent items, one a thread: where a thread begins and how far it steps.
__device__ inline int64_t first_item() { return blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; }
__device__ inline int64_t item_step() { return gridDim.x * static_cast<int64_t>(kThreads); }

// out[target[s]] = scale[s] * a[s] @ w[e] for the rows s of each expert
template <class T> struct Grouped {
  int64_t S, E, K, N;
  const int32_t* offsets;
  Rows<T> a;
  const T* w;
  int64_t w_stride_e, w_stride_k, w_stride_n;
  bool w_aligned, tf32;
  const int64_t* target;  // null: row s
  const float* scale;     // null: one
  T* out;
  int64_t out_stride;
  bool out_aligned;
};
template <class T> cudaError_t run_grouped(const Grouped<T>& p, void* stream);

// out[e] = sum over the rows s of expert e of scale[s] * a[s]^T b[s]
template <class T> struct Outer {
  int64_t E, M, L, parts;
  const int32_t* offsets;
  Rows<T> a, b;
  const float* scale;  // null: one
  bool tf32;
  T* out;              // [E, M, L], or with more than one part
  float* partial;      // [parts, E, M, L]
  bool aligned;
};
template <class T> cudaError_t run_outer(const Outer<T>& p, void* stream);

// out[r] = sum over the members m of row r of weight[m] * source[row of m]
template <class T> struct SegmentSum {
  int64_t rows, columns, n_members;
  const int32_t* offsets;  // [rows + 1]; null: `length` members each
  int64_t length;
  const int32_t* members;  // null: the identity
  const float* weight;     // null: one
  const int64_t* index;    // member m's row of source, nothing if that is outside [0, source_rows); null: m / divisor
  int64_t source_rows;
  int64_t divisor;
  const T* source;
  int64_t stride;
  bool aligned;
  T* out;
  float* pieces;           // [n_members / kPiece, columns] scratch; null: no segment is split
};
template <class T> cudaError_t run_segment_sum(const SegmentSum<T>& p, void* stream);

// out[s] = a[s / divisor] . b[index[s]], zero from *n_live on and where index is outside [0, b_rows)
template <class T> struct Dots {
  int64_t n, columns, divisor;
  const int32_t* n_live;  // null: n
  const T *a, *b;
  int64_t a_stride, b_stride;
  const int64_t* index;  // null: the identity
  int64_t b_rows;
  float* out;
};
template <class T> cudaError_t run_dots(const Dots<T>& p, void* stream);

}  // namespace sparse_ffn_cuda
