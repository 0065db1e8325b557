// gemm_outer.h - for each expert: the sum over its rows of the outer product of two gathered rows, which is the gradient
// of its weights: out[e][m][n] = sum_s A[s][m] * scale[s] * B[s][n]. Every element is written, zero for unused experts.
#pragma once
#include "line_queue.h"
#include "pack.h"

SPARSE_FFN_BEGIN

template <class T> struct OuterGemm {
  const T* a;             // [., M] rows by gather_a (null: sorted position itself)
  int64_t a_stride;
  const int32_t* gather_a;
  int64_t M;
  const T* b;             // [., N] rows by gather_b
  int64_t b_stride;
  const int32_t* gather_b;
  int64_t N;
  const float* scale;     // by sorted position; null: one
  const int32_t* offsets;
  int64_t E;
  T* out[2];              // [E, M, N] each. With two, a row of A is 2 M long: the first M columns belong to out[0],
  int n_threads;          // the others to out[1]; either may be null (not wanted)
};

// False when out of memory.
template <class T> bool run_outer_gemm(const OuterGemm<T>&);
#define SPARSE_FFN_DECLARE(T) extern template bool run_outer_gemm(const OuterGemm<T>&);
SPARSE_FFN_DECLARE(float)
SPARSE_FFN_DECLARE(bf16)
SPARSE_FFN_DECLARE(fp16)
SPARSE_FFN_WITH_TILED(SPARSE_FFN_DECLARE)
#undef SPARSE_FFN_DECLARE

SPARSE_FFN_END
