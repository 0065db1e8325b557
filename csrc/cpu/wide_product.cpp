// wide_product.cpp - products of low-precision matrices whose results stay in fp32: scores that selections compare.
#include "gemm_rows.h"
#include "ops.h"

SPARSE_FFN_BEGIN

template <class T> static bool product(const sparse_ffn_wide_product& p, int32_t* offsets, int32_t* place, float* out) {
  for (int64_t b = 0; b <= p.B; b++) offsets[b] = static_cast<int32_t>(b * p.M);
  for (int64_t b = 0; b < p.B; b++)
    for (int64_t m = 0; m < p.M; m++) place[b * p.M + m] = static_cast<int32_t>(b * p.x_stride_b + m * p.x_stride_m);
  RowGemm<T> g{};
  g.a = static_cast<const T*>(p.x);
  g.a_stride = 1;
  g.gather = place;
  g.K = p.K;
  g.w[0] = static_cast<const T*>(p.w);
  g.w_stride_expert = p.N * p.K;
  g.w_stride_row = p.K;
  g.N = p.N;
  g.offsets = offsets;
  g.E = p.B;
  g.n_threads = p.n_threads;
  return run_row_gemm(g, [&](int64_t, int64_t s, const float* row) { widen(out + s * p.N, row, p.N); });
}

int wide_product(const sparse_ffn_wide_product& p, float* out) {
  advise_huge_pages(out, static_cast<size_t>(p.B * p.M * p.N) * 4);
  int32_t* offsets = scratch_of<int32_t>(kSlotOffsets, p.B + 1);
  int32_t* place = scratch_of<int32_t>(kSlotOrder, p.B * p.M + 1);
  if (!offsets || !place) return SPARSE_FFN_NO_MEMORY;
  const bool done = p.dtype == SPARSE_FFN_FP32   ? product<float>(p, offsets, place, out)
                    : p.dtype == SPARSE_FFN_BF16 ? product<bf16>(p, offsets, place, out)
                                                 : product<fp16>(p, offsets, place, out);
  return done ? SPARSE_FFN_OK : SPARSE_FFN_NO_MEMORY;
}

SPARSE_FFN_END
