// slot_rows.h - grouped products each slot of which has an output row of its own: nothing is summed, so that rows are written
// as they are done.
#pragma once
#include "gemm_rows.h"
#include "problem.h"

SPARSE_FFN_BEGIN

// Whether every row of the output belongs to exactly one slot. False too when there is no memory to tell.
static inline bool one_slot_each(const sparse_ffn_cvmm& p) {
  if (p.rows_out != p.S) return false;
  char* seen = scratch_of<char>(kBufferC, p.S);
  if (!seen) return false;
  memset(seen, 0, static_cast<size_t>(p.S));
  for (int64_t s = 0; s < p.S; s++) seen[p.scatter[s]] = 1;
  return !memchr(seen, 0, static_cast<size_t>(p.S));
}

// g: the product that makes p's output. False when out of memory.
template <class T> static bool run_slot_rows(const sparse_ffn_cvmm& p, const RowGemm<T>& g, T* out) {
  for (int64_t s = p.offsets[p.E]; s < p.S; s++)
    memset(out + p.scatter[s] * p.L, 0, static_cast<size_t>(p.L) * sizeof(T));
  return run_row_gemm(g, [&](const FinishedRow& r) {
    T* to = out + p.scatter[r.s] * p.L + r.n0;
    const V scale = splat(p.scale ? p.scale[r.s] : 1.0f);
    for (int64_t j = 0; j < r.n; j += VL) store_upto(to + j, load_upto(r.c[0] + j, r.n - j) * scale, r.n - j);
  });
}

SPARSE_FFN_END
