// sums.cu - weighted sums of rows over segments (the bag, its values' gradient, CVMM's scatter), and row dot products.
// A thread sums 16 bytes' worth of columns in the order of the segment: no atomics, one order, one result.
#include "kernels.h"

namespace sparse_ffn_cuda {

template <class T> constexpr int kWide = 16 / sizeof(T);

template <class T>
__device__ inline void add_member(const SegmentSum<T>& p, int64_t position, int64_t column, Run<float, kWide<T>>& sum) {
  const int64_t m = p.members ? p.members[position] : position;
  const int64_t row = p.index ? p.index[m] : m / p.divisor;
  if (p.index && (row < 0 || row >= p.source_rows)) return;  // nothing checks indices on a GPU
  const float weight = p.weight ? p.weight[m] : 1.0f;
  const T* source = p.source + row * p.stride + column;
  const Run<T, kWide<T>> run = load_run<T, kWide<T>>(source, p.columns - column, p.aligned);
#pragma unroll
  for (int i = 0; i < kWide<T>; i++) sum.v[i] += weight * to_float(run.v[i]);
}

template <class T> __global__ void __launch_bounds__(kThreads) sum_pieces(SegmentSum<T> p) {
  const int64_t wide = ceil_div(p.columns, kWide<T>), total = p.n_members / kPiece * wide;
  for (int64_t i = first_item(); i < total; i += item_step()) {
    const int64_t piece = i / wide, column = i % wide * kWide<T>;
    if (!piece_inside(piece, p.offsets, p.rows)) continue;
    Run<float, kWide<T>> sum{};
    for (int64_t at = piece * kPiece; at < (piece + 1) * kPiece; at++) add_member(p, at, column, sum);
    store_run(p.pieces + piece * p.columns + column, sum, p.columns - column, p.aligned);
  }
}

template <class T> __global__ void __launch_bounds__(kThreads) sum_segments(SegmentSum<T> p) {
  const int64_t wide = ceil_div(p.columns, kWide<T>), total = p.rows * wide;
  for (int64_t i = first_item(); i < total; i += item_step()) {
    const int64_t row = i / wide, column = i % wide * kWide<T>;
    const int64_t begin = p.offsets ? p.offsets[row] : row * p.length;
    const int64_t end = p.offsets ? p.offsets[row + 1] : begin + p.length;
    Run<float, kWide<T>> sum{};
    for (int64_t at = begin; at < end;) {
      if (p.pieces && takes_piece(at, end)) {
        const float* piece = p.pieces + at / kPiece * p.columns + column;
#pragma unroll
        for (int c = 0; c < kWide<T>; c++)
          if (column + c < p.columns) sum.v[c] += piece[c];
        at += kPiece;
      } else {
        add_member(p, at, column, sum);
        at++;
      }
    }
    store_run(p.out + row * p.columns + column, sum, p.columns - column, p.aligned);
  }
}

template <class T> cudaError_t run_segment_sum(const SegmentSum<T>& p, void* stream) {
  const int64_t wide = ceil_div(p.columns, kWide<T>);
  if (p.pieces && p.columns > 0) {
    const cudaError_t error = launch(sum_pieces<T>, ceil_div(p.n_members / kPiece * wide, kThreads), stream, p);
    if (error != cudaSuccess) return error;
  }
  return launch(sum_segments<T>, ceil_div(p.rows * wide, kThreads), stream, p);
}
template cudaError_t run_segment_sum(const SegmentSum<float>&, void*);
template cudaError_t run_segment_sum(const SegmentSum<bf16>&, void*);
template cudaError_t run_segment_sum(const SegmentSum<fp16>&, void*);

// One warp a dot product. All warps of a block take the same number of turns, with or without a product to compute.
template <class T> __global__ void __launch_bounds__(kThreads) dots(Dots<T> p) {
  constexpr int kWarps = kThreads / 32;
  const int lane = threadIdx.x % 32;
  for (int64_t turn = blockIdx.x; turn < ceil_div(p.n, kWarps); turn += gridDim.x) {
    const int64_t s = turn * kWarps + threadIdx.x / 32;
    float sum = 0.0f;
    const bool live = s < p.n && !(p.n_live && s >= *p.n_live);
    const int64_t row = live && p.index ? p.index[s] : s;
    if (live && !(p.index && (row < 0 || row >= p.b_rows))) {
      const T* a = p.a + s / p.divisor * p.a_stride;
      const T* b = p.b + row * p.b_stride;
      for (int64_t c = lane; c < p.columns; c += 32) sum += to_float(a[c]) * to_float(b[c]);
    }
    sum = warp_sum(sum);
    if (lane == 0 && s < p.n) p.out[s] = sum;
  }
}

template <class T> cudaError_t run_dots(const Dots<T>& p, void* stream) {
  return launch(dots<T>, ceil_div(p.n, kThreads / 32), stream, p);
}
template cudaError_t run_dots(const Dots<float>&, void*);
template cudaError_t run_dots(const Dots<bf16>&, void*);
template cudaError_t run_dots(const Dots<fp16>&, void*);

}  // namespace sparse_ffn_cuda
