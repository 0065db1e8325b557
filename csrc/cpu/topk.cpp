// topk.cpp - the selections: rows of scores, and TopKFFN's hidden units.
#include "ops.h"
#include "select.h"
#include "vec_math.h"

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

// Activations of one row, and the magnitudes to rank by: those of the rounded ones, so that what is equal ties. Those
// that need no more than their value (saves_value) give back numbers that they were given, or zero.
template <class T, class Act>
static void activate_row(const T* u, int64_t F, const float* norm, T* value, float* magnitude) {
  for (int64_t i = 0; i < F; i += VL) {
    const int64_t left = F - i;
    V a = Act::value(load_upto(u + i, left));
    store_upto(value + i, a, left);
    if (sizeof(T) < 4 && !Act::saves_value) a = load_upto(value + i, left);
    const V size = a < zero() ? -a : a;
    store_upto(magnitude + i, norm ? size * load_upto(norm + i, left) : size, left);
  }
}
template <class T> using ActivateRowFn = void (*)(const T*, int64_t, const float*, T*, float*);
template <class T>
static int select_units(const T* u, int64_t rows, int64_t F, int64_t stride, sparse_ffn_activation activation,
                        const float* norm, int64_t k, int n_threads, int64_t* index, T* kept) {
  const ActivateRowFn<T> activate = with_activation(
      activation, [](auto act) -> ActivateRowFn<T> { return activate_row<T, decltype(act)>; });
  int failed = 0;
#pragma omp parallel num_threads(larger(1, n_threads))
  {
    const Candidates candidates = Candidates::reserve(F);
    int32_t* best = scratch_of<int32_t>(kBufferC, F);
    T* value = scratch_of<T>(kBufferA, F + VL);
    float* magnitude = scratch_of<float>(kBufferB, F + VL);
    const bool ready = candidates.ready() && best && value && magnitude;
    if (!ready) {
#pragma omp atomic write
      failed = 1;
    }
#pragma omp for schedule(static)
    for (int64_t t = 0; t < rows; t++) {
      if (!ready) continue;
      activate(u + t * stride, F, norm, value, magnitude);
      select_row(magnitude, F, k, candidates, best);
      for (int64_t j = 0; j < k; j++) {
        index[t * k + j] = best[j];
        kept[t * k + j] = value[best[j]];
      }
    }
  }
  return failed ? SPARSE_FFN_NO_MEMORY : SPARSE_FFN_OK;
}

int topk_activation(const void* u, int64_t T, int64_t F, int64_t stride, int32_t dtype, sparse_ffn_activation activation,
                    const float* norm, int64_t k, int32_t n_threads, int64_t* index, void* kept) {
  return with_dtype(dtype, [&](auto example) {
    using S = decltype(example);
    return select_units(static_cast<const S*>(u), T, F, stride, activation, norm, k, n_threads, index,
                        static_cast<S*>(kept));
  });
}

SPARSE_FFN_END
