// multiply.h - a block's product of two tiles in shared memory, accumulated in registers in fp32.
// The left tile is [kRows][depth] or, if A_ACROSS, [depth][kRows]; the right one [depth][kColumns] or, if B_ACROSS,
// [kColumns][depth]: tiles lie as their rows were copied. Rows are padded by 16 bytes against bank conflicts.
#pragma once
#include "device.h"

namespace sparse_ffn_cuda {

template <class T, bool A_ACROSS, bool B_ACROSS> struct Tiles {
  using Storage = T;
  static constexpr int kPad = 16 / sizeof(T);
  static constexpr int kDepth = 64 / sizeof(T);
  static constexpr int kOuterA = A_ACROSS ? kDepth : kRows, kInnerA = A_ACROSS ? kRows : kDepth;
  static constexpr int kPitchA = kInnerA + kPad;
  static constexpr int kOuterB = B_ACROSS ? kColumns : kDepth, kInnerB = B_ACROSS ? kDepth : kColumns;
  static constexpr int kPitchB = kInnerB + kPad;
  static constexpr int kElementsA = kOuterA * kPitchA, kStage = kElementsA + kOuterB * kPitchB;
};

// fp16, bf16, and fp32 rounded to tf32: tensor cores. Four warps, each with half of the rows and half of the columns.
template <class T, bool A_ACROSS, bool B_ACROSS, bool PLAIN = false> struct Multiply : Tiles<T, A_ACROSS, B_ACROSS> {
  using Base = Tiles<T, A_ACROSS, B_ACROSS>;
  static constexpr bool kTf32 = sizeof(T) == 4;
  static constexpr int kK = kTf32 ? 8 : 16, kDown = kRows / 32, kRight = kColumns / 32, kPitch = 20, kRun = 8;
  template <class U, class V> struct Operand { using type = V; };
  template <class V> struct Operand<float, V> { using type = wmma::precision::tf32; };
  template <bool C, class X, class Y> struct Either { using type = X; };
  template <class X, class Y> struct Either<false, X, Y> { using type = Y; };
  using In = typename Operand<T, T>::type;
  template <bool ACROSS> using Layout = typename Either<ACROSS, wmma::col_major, wmma::row_major>::type;
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

  // Calls visit(row, column, run of 8) for the thread's part of the sums; which thread holds which number of a fragment
  // is not documented, so they pass through shared memory, one patch a warp.
  template <class Visit> __device__ void each(float* shared, Visit visit) {
    float* patch = shared + threadIdx.x / 32 * (16 * kPitch);
    const int lane = threadIdx.x % 32, r = lane / 2, c = lane % 2 * kRun;
#pragma unroll
    for (int i = 0; i < kDown; i++)
#pragma unroll
      for (int j = 0; j < kRight; j++) {
        wmma::store_matrix_sync(patch, sum[i][j], kPitch, wmma::mem_row_major);
        __syncwarp();
        Run<float, kRun> run;
#pragma unroll
        for (int n = 0; n < kRun; n++) run.v[n] = patch[r * kPitch + c + n];
        visit(row(i) + r, column(j) + c, run);
        __syncwarp();
      }
  }
};

// fp32 as it is: 8 x 8 sums a thread.
template <bool A_ACROSS, bool B_ACROSS>
struct Multiply<float, A_ACROSS, B_ACROSS, true> : Tiles<float, A_ACROSS, B_ACROSS> {
  using Base = Tiles<float, A_ACROSS, B_ACROSS>;
  static constexpr int kDown = 8, kRight = 8, kRun = 4;
  float sum[kDown][kRight];

  static __device__ int row(int i) { return threadIdx.x / 16 + i * 8; }
  static __device__ int column(int j) { return j / kRun * 64 + threadIdx.x % 16 * kRun + j % kRun; }

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kDown; i++)
#pragma unroll
      for (int j = 0; j < kRight; j++) sum[i][j] = 0.0f;
  }

  __device__ void add(const float* a, const float* b) {
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

  template <class Visit> __device__ void each(float*, Visit visit) {
#pragma unroll
    for (int i = 0; i < kDown; i++)
#pragma unroll
      for (int j = 0; j < kRight; j += kRun) {
        Run<float, kRun> run;
#pragma unroll
        for (int n = 0; n < kRun; n++) run.v[n] = sum[i][j + n];
        visit(row(i), column(j), run);
      }
  }
};

}  // namespace sparse_ffn_cuda
