// grouped.cu - rows grouped by expert times that expert's matrix.
#include "kernels.h"

namespace sparse_ffn_cuda {

template <class M, bool W_ACROSS, class T> __global__ void __launch_bounds__(kThreads) grouped(Grouped<T> p) {
  alignas(128) __shared__ unsigned char memory[2 * M::kStage * sizeof(T)];
  T* shared = reinterpret_cast<T*>(memory);
  const int64_t across = ceil_div(p.N, kColumns), total = row_tiles(p.S, p.E) * across;
  for (int64_t tile = blockIdx.x; tile < total; tile += gridDim.x) {
    const Range rows = row_tile(tile / across, p.offsets, p.E);
    const int64_t column = tile % across * kColumns;
    if (rows.begin >= rows.end) continue;
    const Rows<T> w{p.w + rows.expert * p.w_stride_e, W_ACROSS ? p.w_stride_n : p.w_stride_k, nullptr, p.w_aligned};
    M sum;
    sum.clear();
    multiply(
        sum, shared, p.K,
        [&](T* tiles, int64_t k) {
          copy_tile<M::kOuterA, M::kInnerA, M::kPitchA>(tiles, p.a, rows.begin, rows.end, k, p.K);
          if (W_ACROSS) copy_tile<M::kOuterB, M::kInnerB, M::kPitchB>(tiles + M::kElementsA, w, column, p.N, k, p.K);
          else copy_tile<M::kOuterB, M::kInnerB, M::kPitchB>(tiles + M::kElementsA, w, k, p.K, column, p.N);
        },
        [](T*, int64_t) {});
    sum.each(reinterpret_cast<float*>(memory), [&](int m, int n, auto run) {
      const int64_t s = rows.begin + m, left = p.N - column - n;
      if (s >= rows.end || left <= 0) return;
      const float scale = p.scale ? p.scale[s] : 1.0f;
      for (float& v : run.v) v *= scale;
      store_run(p.out + (p.target ? p.target[s] : s) * p.out_stride + column + n, run, left, p.out_aligned);
    });
    __syncthreads();  // before the next tile is copied where the sums pass
  }
}

template <class T> cudaError_t run_grouped(const Grouped<T>& p, void* stream) {
  const int64_t blocks = row_tiles(p.S, p.E) * ceil_div(p.N, kColumns);
  if (p.S == 0 || p.E == 0) return cudaSuccess;
  const bool across = p.w_stride_n != 1;
  if constexpr (sizeof(T) == 4) {
    if (!p.tf32)
      return across ? launch(grouped<Multiply<T, false, true, true>, true, T>, blocks, stream, p)
                    : launch(grouped<Multiply<T, false, false, true>, false, T>, blocks, stream, p);
  }
  return across ? launch(grouped<Multiply<T, false, true>, true, T>, blocks, stream, p)
                : launch(grouped<Multiply<T, false, false>, false, T>, blocks, stream, p);
}
template cudaError_t run_grouped(const Grouped<float>&, void*);
template cudaError_t run_grouped(const Grouped<bf16>&, void*);
template cudaError_t run_grouped(const Grouped<fp16>&, void*);

}  // namespace sparse_ffn_cuda
