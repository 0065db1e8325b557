// gemm_scatter.h - for each expert: its rows times its weights, scaled and summed into output rows by a scatter index.
// Threads own output columns (and, for many tokens, token ranges): no atomics, and every element is summed in expert
// order by one owner, so the result does not depend on the number of threads. A block of output columns is summed in a
// compact fp32 buffer that stays in L2: at the natural stride (often a power of two) the rows would fight for the same
// cache sets, and blocks wider than L2 halve the speed when the shared L3 is busy (measured).
#pragma once
#include "gemm_rows.h"

SPARSE_FFN_BEGIN

template <class T> struct ScatterGemm {
  const T* a;             // row of sorted position s: a + gather[s] * a_stride (gather null: s itself)
  int64_t a_stride;
  const int32_t* gather;
  int64_t K;              // elements of a row per weight tensor: with two (GLU), a row of A is 2 K long
  const T* w[2];          // W[e][k][n] = w[e * expert + k * k_stride + n * n_stride]; one of the two strides is 1
  int64_t w_stride_expert, w_stride_k, w_stride_n;
  // Or, with w null: writes columns n0 .. n0+columns-1 of expert e to `to`, as [K, columns] if w_stride_n is 1, else as
  // [columns, K]. They are then always packed.
  void (*fill)(const void* source, int64_t e, int64_t n0, int64_t columns, T* to);
  const void* source;
  int64_t N;
  const int32_t* offsets;
  int64_t E;
  const int32_t* scatter;  // output row of sorted position s; null in the product of extra_a: s itself
  const float* scale;      // by sorted position; null: one
  T* out;                  // [rows_out, N], written completely
  int64_t out_stride, rows_out;
  const T* extra_a;        // or null: one product more, of all output rows in order: out += extra_a [rows_out, extra_K]
  const T* extra_w;        // times extra_w [extra_K, N]
  int64_t extra_K;
  int n_threads;

  const T* row(int64_t s) const { return a + (gather ? gather[s] : s) * a_stride; }
  int64_t matrices() const { return w[1] ? 2 : 1; }
};

// False when out of memory.
template <class T> bool run_scatter_gemm(const ScatterGemm<T>&);

// mr rows (packed by rows in pa) times k rows of B read where they lie, scattered into out; tail: kKBlock * VL words of
// scratch. The rows of B are the first ones, or those of a list of at most a block's, which kListAhead more entries follow.
template <class T> constexpr int64_t kDirectBlock = kKBlock * (kDirectProduct<T> == Product::kPaired ? 2 : 1);
template <class T>
void scatter_direct(int mr, int64_t k, int64_t columns, const float* pa, const T* w, int64_t w_stride,
                    const int32_t* rows, float* tail, const TileOut& out);

#define SPARSE_FFN_DECLARE(T)                                                                                     \
  extern template bool run_scatter_gemm(const ScatterGemm<T>&);                                                   \
  extern template void scatter_direct(int, int64_t, int64_t, const float*, const T*, int64_t, const int32_t*, float*, \
                                      const TileOut&);
SPARSE_FFN_DECLARE(float)
SPARSE_FFN_DECLARE(bf16)
SPARSE_FFN_DECLARE(fp16)
SPARSE_FFN_WITH_TILED(SPARSE_FFN_DECLARE)
#undef SPARSE_FFN_DECLARE

SPARSE_FFN_END
