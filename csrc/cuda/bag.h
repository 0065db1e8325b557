// bag.h - weighted sums of rows, and dot products of rows. A thread sums 16 bytes' worth of columns in the order of the
// members: no atomics, one order, one result.
#pragma once
#include "device.h"

namespace sparse_ffn_cuda {

// OF_VALUES: a row of values out of the bags that have it as a member; else a bag out of its rows of values.
template <class T, bool OF_VALUES> __global__ void __launch_bounds__(kThreads) sum_rows(sparse_ffn_cuda_bag p) {
  constexpr int kWide = 16 / sizeof(T);
  const T* source = static_cast<const T*>(OF_VALUES ? p.bags : p.values);
  T* out = static_cast<T*>(OF_VALUES ? p.values : p.bags);
  const int64_t wide = ceil_div(p.O, kWide), total = (OF_VALUES ? p.N : p.T) * wide;
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < total; i += gridDim.x * int64_t{kThreads}) {
    const int64_t row = i / wide, column = i % wide * kWide;
    const int64_t begin = OF_VALUES ? p.offsets[row] : row * p.J, end = OF_VALUES ? p.offsets[row + 1] : begin + p.J;
    Run<float, kWide> sum{};
    for (int64_t at = begin; at < end; at++) {
      const int64_t m = OF_VALUES ? p.members[at] : at, from = OF_VALUES ? m / p.J : p.index[m];
      if (!OF_VALUES && (from < 0 || from >= p.N)) continue;  // nothing checks indices on a GPU
      const float weight = p.weight ? p.weight[m] : 1.0f;
      const Run<T, kWide> run = load_run<T, kWide>(source + from * p.O + column, p.O - column);
#pragma unroll
      for (int c = 0; c < kWide; c++) sum.v[c] += weight * to_float(run.v[c]);
    }
    store_run(out + row * p.O + column, sum, p.O - column);
  }
}

// One warp a dot product. All warps of a block take the same number of turns, with or without a product to compute.
template <class T> __global__ void __launch_bounds__(kThreads) dots(sparse_ffn_cuda_bag p) {
  constexpr int kWarps = kThreads / 32;
  const int64_t n = p.T * p.J;
  for (int64_t turn = blockIdx.x; turn < ceil_div(n, kWarps); turn += gridDim.x) {
    const int64_t m = turn * kWarps + threadIdx.x / 32, row = m < n ? p.index[m] : -1;
    float sum = 0.0f;
    if (row >= 0 && row < p.N) {
      const T* bag = static_cast<const T*>(p.bags) + m / p.J * p.O;
      const T* values = static_cast<const T*>(p.values) + row * p.O;
      for (int64_t c = threadIdx.x % 32; c < p.O; c += 32) sum += to_float(bag[c]) * to_float(values[c]);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0 && m < n) p.weight[m] = sum;
  }
}

template <class T, bool OF_VALUES> cudaError_t bag_sums(const sparse_ffn_cuda_bag& p) {
  const int64_t wide = ceil_div(p.O, 16 / sizeof(T));
  return launch(sum_rows<T, OF_VALUES>, ceil_div((OF_VALUES ? p.N : p.T) * wide, kThreads), p.stream, p);
}
template <class T> cudaError_t bag_weights(const sparse_ffn_cuda_bag& p) {
  return launch(dots<T>, ceil_div(p.T * p.J, kThreads / 32), p.stream, p);
}

}  // namespace sparse_ffn_cuda
