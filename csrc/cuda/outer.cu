// outer.cu - the weights' gradient: for each expert the product of its rows of x, transposed, with its rows of dout.
// The sum over rows is split where experts are few; the parts are added in their order by a second kernel.
#include "kernels.h"

namespace sparse_ffn_cuda {

template <class M, class T> __global__ void __launch_bounds__(kThreads) outer(Outer<T> p) {
  alignas(128) __shared__ unsigned char memory[2 * M::kStage * sizeof(T)];
  T* shared = reinterpret_cast<T*>(memory);
  const int64_t across = ceil_div(p.L, kColumns), tiles_of_one = matrix_tiles(p.M, p.L);
  const int64_t total = p.E * tiles_of_one * p.parts;
  for (int64_t tile = blockIdx.x; tile < total; tile += gridDim.x) {
    const int64_t part = tile / (p.E * tiles_of_one), e = tile / tiles_of_one % p.E, within = tile % tiles_of_one;
    const Range rows = split_range(e, part, p.parts, M::kDepth, p.offsets);
    const int64_t row = within / across * kRows, column = within % across * kColumns;
    M sum;
    sum.clear();
    multiply(
        sum, shared, rows.end - rows.begin,
        [&](T* tiles, int64_t at) {
          const int64_t s = rows.begin + at;
          copy_tile<M::kOuterA, M::kInnerA, M::kPitchA>(tiles, p.a, s, rows.end, row, p.M);
          copy_tile<M::kOuterB, M::kInnerB, M::kPitchB>(tiles + M::kElementsA, p.b, s, rows.end, column, p.L);
        },
        [&](T* tiles, int64_t at) {
          if (!p.scale) return;
          for (int i = threadIdx.x; i < M::kOuterA * M::kInnerA; i += kThreads) {
            const int64_t s = rows.begin + at + i / M::kInnerA;
            T& v = tiles[i / M::kInnerA * M::kPitchA + i % M::kInnerA];
            if (s < rows.end) from_float(to_float(v) * p.scale[s], v);
          }
          __syncthreads();
        });
    sum.each(reinterpret_cast<float*>(memory), [&](int m, int n, const auto& run) {
      const int64_t left = p.L - column - n;
      if (row + m >= p.M || left <= 0) return;
      const int64_t at = ((part * p.E + e) * p.M + row + m) * p.L + column + n;
      if (p.parts > 1) store_run(p.partial + at, run, left, p.aligned);
      else store_run(p.out + at, run, left, p.aligned);
    });
    __syncthreads();  // before the next tile is copied where the sums pass
  }
}

template <class T> struct Parts {
  int64_t n, parts;
  const float* partial;
  T* out;
};
template <class T> __global__ void __launch_bounds__(kThreads) add_parts(Parts<T> p) {
  for (int64_t i = first_item(); i < p.n; i += item_step()) {
    float sum = 0.0f;
    for (int64_t part = 0; part < p.parts; part++) sum += p.partial[part * p.n + i];
    from_float(sum, p.out[i]);
  }
}

template <class T> cudaError_t run_outer(const Outer<T>& p, void* stream) {
  const int64_t blocks = p.E * matrix_tiles(p.M, p.L) * p.parts, n = p.E * p.M * p.L;
  if (n == 0) return cudaSuccess;
  cudaError_t error;
  bool done = false;
  if constexpr (sizeof(T) == 4) {
    if (!p.tf32) {
      error = launch(outer<Multiply<T, true, false, true>, T>, blocks, stream, p);
      done = true;
    }
  }
  if (!done) error = launch(outer<Multiply<T, true, false>, T>, blocks, stream, p);
  if (error != cudaSuccess || p.parts == 1) return error;
  return launch(add_parts<T>, ceil_div(n, kThreads), stream, Parts<T>{n, p.parts, p.partial, p.out});
}
template cudaError_t run_outer(const Outer<float>&, void*);
template cudaError_t run_outer(const Outer<bf16>&, void*);
template cudaError_t run_outer(const Outer<fp16>&, void*);

}  // namespace sparse_ffn_cuda
