// pipeline.h - copies tiles into shared memory, the next ones while the present ones are multiplied.
#pragma once
#include "multiply.h"

namespace sparse_ffn_cuda {

// Rows of a matrix, or the rows that an index names.
template <class T> struct Rows {
  const T* data;
  int64_t stride;
  const int64_t* index;  // null: the identity
  bool aligned;
  __device__ const T* at(int64_t i) const { return data + (index ? index[i] : i) * stride; }
};

// tile[o][i] = row (outer + o), element (inner + i); zero from outer_end and inner_end on. No byte past them is read.
template <int OUTER, int INNER, int PITCH, class T>
__device__ inline void copy_tile(T* tile, const Rows<T>& rows, int64_t outer, int64_t outer_end, int64_t inner,
                                 int64_t inner_end) {
  constexpr int kRun = 16 / sizeof(T), kRuns = INNER / kRun;
#pragma unroll 1
  for (int c = threadIdx.x; c < OUTER * kRuns; c += kThreads) {
    const int o = c / kRuns, i = c % kRuns * kRun;
    T* to = tile + o * PITCH + i;
    const int64_t left = outer + o < outer_end ? larger<int64_t>(inner_end - inner - i, 0) : 0;
    const int n = static_cast<int>(lesser<int64_t>(left, kRun));
    const T* from = n ? rows.at(outer + o) + inner + i : rows.data;
    if (rows.aligned) {
      copy_async(to, from, n * static_cast<int>(sizeof(T)));
    } else {
      *reinterpret_cast<Run<T, kRun>*>(to) = load_run<T, kRun>(from, n, false);
    }
  }
}

// sum += the product over `depth`, in steps of M::kDepth: copy(tiles, at) brings a step's two tiles, adjust may change
// them.
template <class M, class Copy, class Adjust>
__device__ inline void multiply(M& sum, typename M::Storage* shared, int64_t depth, Copy copy, Adjust adjust) {
  if (depth > 0) copy(shared, 0);
  close_copies();
  int stage = 0;
  for (int64_t at = 0; at < depth; at += M::kDepth, stage ^= 1) {
    if (at + M::kDepth < depth) copy(shared + (stage ^ 1) * M::kStage, at + M::kDepth);
    close_copies();
    wait_for_copies<1>();
    __syncthreads();
    typename M::Storage* tiles = shared + stage * M::kStage;
    adjust(tiles, at);
    sum.add(tiles, tiles + M::kElementsA);
    __syncthreads();  // before the next copies go where these tiles are
  }
  wait_for_copies<0>();
}

}  // namespace sparse_ffn_cuda
