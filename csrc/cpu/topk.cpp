// topk.cpp - the selection out of rows of scores.
#include "ops.h"
#include "select.h"

SPARSE_FFN_BEGIN

int topk(const float* scores, int64_t R, int64_t n, int64_t stride, int64_t k, int32_t n_threads, int64_t* index,
         float* values) {
  int failed = 0;
#pragma omp parallel num_threads(larger(1, n_threads))
  {
    const Candidates candidates = Candidates::reserve(n);
    int32_t* best = scratch_of<int32_t>(kBufferC, n);
    const bool ready = candidates.ready() && best;
    if (!ready) {
#pragma omp atomic write
      failed = 1;
    }
#pragma omp for schedule(static)
    for (int64_t r = 0; r < R; r++) {
      if (!ready) continue;
      const float* row = scores + r * stride;
      select_row(row, n, k, candidates, best);
      for (int64_t j = 0; j < k; j++) {
        index[r * k + j] = best[j];
        if (values) values[r * k + j] = row[best[j]];
      }
    }
  }
  return failed ? SPARSE_FFN_NO_MEMORY : SPARSE_FFN_OK;
}

SPARSE_FFN_END
