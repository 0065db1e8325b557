// product.h - products of slots' rows, sorted by expert, with their expert's matrix, and the gradient of the matrices.
// A block copies a tile of either operand into shared memory, its rows as they lie, multiplies the two, and sums in fp32
// in registers; the blocks of a multiprocessor hide each other's copies.
#pragma once
#include <type_traits>

#include "device.h"

namespace sparse_ffn_cuda {

// The two tiles: the left one is [kRows][kDepth] or, if A_ACROSS, [kDepth][kRows]; the right one [kDepth][kColumns] or,
// if B_ACROSS, [kColumns][kDepth]. Rows are padded by 16 bytes against bank conflicts.
template <class T, bool A_ACROSS, bool B_ACROSS> struct Tiles {
  using Storage = T;
  static constexpr bool kAcrossA = A_ACROSS, kAcrossB = B_ACROSS;
  static constexpr int kRun = 16 / sizeof(T), kDepth = 4 * kRun;
  static constexpr int kOuterA = A_ACROSS ? kDepth : kRows, kInnerA = A_ACROSS ? kRows : kDepth;
  static constexpr int kOuterB = B_ACROSS ? kColumns : kDepth, kInnerB = B_ACROSS ? kDepth : kColumns;
  static constexpr int kPitchA = kInnerA + kRun, kPitchB = kInnerB + kRun;
  static constexpr int kSizeA = kOuterA * kPitchA, kSize = kSizeA + kOuterB * kPitchB;
};

// fp16, bf16, and fp32 rounded to tf32: tensor cores. Four warps, each with half of the rows and half of the columns.
template <class T, bool A_ACROSS, bool B_ACROSS> struct Matrix : Tiles<T, A_ACROSS, B_ACROSS> {
  using Base = Tiles<T, A_ACROSS, B_ACROSS>;
  static constexpr bool kTf32 = sizeof(T) == 4;
  static constexpr int kK = kTf32 ? 8 : 16, kDown = kRows / 32, kRight = kColumns / 32, kPitch = 20, kWide = 8;
  using In = std::conditional_t<kTf32, wmma::precision::tf32, T>;
  template <bool ACROSS> using Layout = std::conditional_t<ACROSS, wmma::col_major, wmma::row_major>;
  using A = wmma::fragment<wmma::matrix_a, 16, 16, kK, In, Layout<A_ACROSS>>;
  using B = wmma::fragment<wmma::matrix_b, 16, 16, kK, In, Layout<B_ACROSS>>;
  wmma::fragment<wmma::accumulator, 16, 16, kK, float> sum[kDown][kRight];

  static __device__ int row(int i) { return (threadIdx.x / 64 * kDown + i) * 16; }
  static __device__ int column(int j) { return (threadIdx.x / 32 % 2 * kRight + j) * 16; }

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kDown; i++)
#pragma unroll
      for (int j = 0; j < kRight; j++) wmma::fill_fragment(sum[i][j], 0.0f);
  }

  __device__ void add(const T* a, const T* b) {
#pragma unroll
    for (int k = 0; k < Base::kDepth; k += kK) {
      A left[kDown];
#pragma unroll
      for (int i = 0; i < kDown; i++) {
        const int at = A_ACROSS ? k * Base::kPitchA + row(i) : row(i) * Base::kPitchA + k;
        wmma::load_matrix_sync(left[i], a + at, Base::kPitchA);
        if constexpr (kTf32) round_to_tf32(left[i]);
      }
#pragma unroll
      for (int j = 0; j < kRight; j++) {
        B right;
        const int at = B_ACROSS ? column(j) * Base::kPitchB + k : k * Base::kPitchB + column(j);
        wmma::load_matrix_sync(right, b + at, Base::kPitchB);
        if constexpr (kTf32) round_to_tf32(right);
#pragma unroll
        for (int i = 0; i < kDown; i++) wmma::mma_sync(sum[i][j], left[i], right, sum[i][j]);
      }
    }
  }

  // Calls visit(row, column, run of numbers) for the thread's part of the sums; which thread holds which number of a
  // fragment is not documented, so they pass through shared memory, one patch a warp.
  template <class Visit> __device__ void each(void* shared, Visit visit) {
    float* patch = static_cast<float*>(shared) + threadIdx.x / 32 * (16 * kPitch);
    const int lane = threadIdx.x % 32, r = lane / 2, c = lane % 2 * kWide;
#pragma unroll
    for (int i = 0; i < kDown; i++)
#pragma unroll
      for (int j = 0; j < kRight; j++) {
        wmma::store_matrix_sync(patch, sum[i][j], kPitch, wmma::mem_row_major);
        __syncwarp();
        Run<float, kWide> run;
#pragma unroll
        for (int n = 0; n < kWide; n++) run.v[n] = patch[r * kPitch + c + n];
        visit(row(i) + r, column(j) + c, run);
        __syncwarp();
      }
  }
};

// fp32 as it is: 8 x 8 sums a thread.
template <class T, bool A_ACROSS, bool B_ACROSS> struct Plain : Tiles<T, A_ACROSS, B_ACROSS> {
  using Base = Tiles<T, A_ACROSS, B_ACROSS>;
  static constexpr int kDown = 8, kRight = 8, kWide = 4;
  float sum[kDown][kRight];

  static __device__ int row(int i) { return threadIdx.x / 16 + i * 8; }
  static __device__ int column(int j) { return j / kWide * 64 + threadIdx.x % 16 * kWide + j % kWide; }

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kDown; i++)
#pragma unroll
      for (int j = 0; j < kRight; j++) sum[i][j] = 0.0f;
  }

  __device__ void add(const T* a, const T* b) {
#pragma unroll 4
    for (int k = 0; k < Base::kDepth; k++) {
      float left[kDown], right[kRight];
#pragma unroll
      for (int i = 0; i < kDown; i++)
        left[i] = A_ACROSS ? a[k * Base::kPitchA + row(i)] : a[row(i) * Base::kPitchA + k];
#pragma unroll
      for (int j = 0; j < kRight; j++)
        right[j] = B_ACROSS ? b[column(j) * Base::kPitchB + k] : b[k * Base::kPitchB + column(j)];
#pragma unroll
      for (int i = 0; i < kDown; i++)
#pragma unroll
        for (int j = 0; j < kRight; j++) sum[i][j] += left[i] * right[j];
    }
  }

  template <class Visit> __device__ void each(void*, Visit visit) {
#pragma unroll
    for (int i = 0; i < kDown; i++)
#pragma unroll
      for (int j = 0; j < kRight; j += kWide) {
        Run<float, kWide> run;
#pragma unroll
        for (int n = 0; n < kWide; n++) run.v[n] = sum[i][j + n];
        visit(row(i), column(j), run);
      }
  }
};

// Rows of a matrix, or those that an index names, times their scale.
template <class T> struct Rows {
  const T* data;
  int64_t stride;
  const int64_t* index;  // null: the identity
  const float* scale;    // null: one
};

// tile[o][i] = row (outer + o), element (inner + i); zero from outer_end and inner_end on. Nothing past them is read.
template <int OUTER, int INNER, class T>
__device__ inline void copy_tile(T* tile, const Rows<T>& rows, int64_t outer, int64_t outer_end, int64_t inner,
                                 int64_t inner_end) {
  constexpr int kRun = 16 / sizeof(T), kRuns = INNER / kRun, kPitch = INNER + kRun;
#pragma unroll 2  // of all at once registers would spill
  for (int c = threadIdx.x; c < OUTER * kRuns; c += kThreads) {
    const int64_t o = outer + c / kRuns, i = inner + c % kRuns * kRun;
    Run<T, kRun> run{};
    if (o < outer_end) {
      run = load_run<T, kRun>(rows.data + (rows.index ? rows.index[o] : o) * rows.stride + i, inner_end - i);
      if (rows.scale)
        for (T& v : run.v) from_float(to_float(v) * rows.scale[o], v);
    }
    *reinterpret_cast<Run<T, kRun>*>(tile + c / kRuns * kPitch + c % kRuns * kRun) = run;
  }
}

// y's rows out of x's rows and w, or, where the left tile lies across, w out of both: there the sum is over slots.
template <class M> __global__ void __launch_bounds__(kThreads) multiply(sparse_ffn_cuda_product p) {
  using T = typename M::Storage;
  constexpr bool kGradient = M::kAcrossA;
  alignas(128) __shared__ unsigned char memory[M::kSize * sizeof(T)];
  T *tile_a = reinterpret_cast<T*>(memory), *tile_b = tile_a + M::kSizeA;
  T *y = static_cast<T*>(p.y), *w = static_cast<T*>(p.w);
  const Rows<T> x{static_cast<const T*>(p.x), p.x_stride, p.x_rows, nullptr};
  const int64_t across = ceil_div(p.N, kColumns), down = ceil_div(p.K, kRows);
  const int64_t total = (kGradient ? p.E * down : row_tiles(p.S, p.E)) * across;
  for (int64_t tile = blockIdx.x; tile < total; tile += gridDim.x) {
    const int64_t which = tile / across, column = tile % across * kColumns;
    Range rows = kGradient ? Range{which / down, which % down * kRows, p.K} : row_tile(which, p.offsets, p.E);
    if (rows.begin >= rows.end) continue;
    const int64_t begin = kGradient ? p.offsets[rows.expert] : 0, end = kGradient ? p.offsets[rows.expert + 1] : p.K;
    // scaled and rounded is the side of gradients: a loss scale keeps these, and not x, above fp16's smallest numbers
    const Rows<T> b = kGradient ? Rows<T>{y, p.y_stride, p.y_rows, p.scale}
                                : Rows<T>{w + rows.expert * p.w_stride_e, M::kAcrossB ? p.w_stride_n : p.w_stride_k,
                                          nullptr, nullptr};
    M sum;
    sum.clear();
    for (int64_t k = begin; k < end; k += M::kDepth) {
      if constexpr (kGradient) copy_tile<M::kOuterA, M::kInnerA>(tile_a, x, k, end, rows.begin, rows.end);
      else copy_tile<M::kOuterA, M::kInnerA>(tile_a, x, rows.begin, rows.end, k, end);
      if constexpr (M::kAcrossB) copy_tile<M::kOuterB, M::kInnerB>(tile_b, b, column, p.N, k, end);
      else copy_tile<M::kOuterB, M::kInnerB>(tile_b, b, k, end, column, p.N);
      __syncthreads();
      sum.add(tile_a, tile_b);
      __syncthreads();  // before the next copies, or the sums, go where these tiles are
    }
    sum.each(memory, [&](int m, int n, auto run) {
      const int64_t row = rows.begin + m, left = p.N - column - n;
      if (row >= rows.end || left <= 0) return;
      T* out = kGradient ? w + (rows.expert * p.K + row) * p.N : y + (p.y_rows ? p.y_rows[row] : row) * p.y_stride;
      if (!kGradient && p.scale)
        for (float& v : run.v) v *= p.scale[row];
      store_run(out + column + n, run, left);
    });
    __syncthreads();  // before the next tile is copied where the sums pass
  }
}

template <class T, bool A_ACROSS, bool B_ACROSS>
cudaError_t multiply_as(const sparse_ffn_cuda_product& p, int64_t blocks) {
  if constexpr (sizeof(T) == 4)
    if (!p.tf32) return launch(multiply<Plain<T, A_ACROSS, B_ACROSS>>, blocks, p.stream, p);
  return launch(multiply<Matrix<T, A_ACROSS, B_ACROSS>>, blocks, p.stream, p);
}
template <class T> cudaError_t product_rows(const sparse_ffn_cuda_product& p) {
  if (p.S == 0 || p.E == 0) return cudaSuccess;
  const int64_t blocks = row_tiles(p.S, p.E) * ceil_div(p.N, kColumns);
  return p.w_stride_n == 1 ? multiply_as<T, false, false>(p, blocks) : multiply_as<T, false, true>(p, blocks);
}
template <class T> cudaError_t product_matrices(const sparse_ffn_cuda_product& p) {
  return multiply_as<T, true, false>(p, p.E * ceil_div(p.K, kRows) * ceil_div(p.N, kColumns));
}

}  // namespace sparse_ffn_cuda
