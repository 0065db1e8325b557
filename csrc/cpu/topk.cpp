// topk.cpp - the selections: rows of scores, the two halves of product keys, and TopKFFN's hidden units.
#include "ops.h"
#include "select.h"
#include "vec_math.h"

SPARSE_FFN_BEGIN

int topk(const float* scores, int64_t R, int64_t n, int64_t stride, int64_t k, int32_t n_threads, int64_t* index,
         float* values) {
  int failed = 0;
#pragma omp parallel num_threads(larger(1, n_threads))
  {
    uint64_t* keys = scratch_of<uint64_t>(kSlotRow, n + VL);
    if (!keys) {
#pragma omp atomic write
      failed = 1;
    }
#pragma omp for schedule(static)
    for (int64_t r = 0; r < R; r++) {
      if (!keys) continue;
      const float* row = scores + r * stride;
      select_row(row, n, k, keys);
      for (int64_t j = 0; j < k; j++) {
        const int64_t i = index_of(keys[j]);
        index[r * k + j] = i;
        if (values) values[r * k + j] = row[i];
      }
    }
  }
  return failed ? SPARSE_FFN_NO_MEMORY : SPARSE_FFN_OK;
}

// One row of the product: best of both halves, then of the pairs that can win. Pair (i, j) is beaten or preceded by all
// (i', j') with i' <= i and j' <= j, so it can be among the k best only if (i + 1)(j + 1) <= k: about k ln k pairs of k^2.
static void product_row(const float* first, const float* second, int64_t n, int64_t k, uint64_t* keys, int32_t* half,
                        float* value, uint64_t* pairs, int64_t* index, float* sums) {
  const int64_t m = lesser(k, n);
  for (int h = 0; h < 2; h++) {
    const float* row = h ? second : first;
    select_row(row, n, m, keys);
    for (int64_t i = 0; i < m; i++) {
      half[h * m + i] = static_cast<int32_t>(index_of(keys[i]));
      value[h * m + i] = row[half[h * m + i]];
    }
  }
  int64_t count = 0;
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = 0; j < m && (i + 1) * (j + 1) <= k; j++) pairs[count++] = key_of(value[i] + value[m + j], i * m + j);
  if (k < count) partition_largest(pairs, count, k);
  sort_descending(pairs, k);
  for (int64_t c = 0; c < k; c++) {
    const int64_t position = index_of(pairs[c]), i = position / m, j = position % m;
    index[c] = half[i] * n + half[m + j];
    if (sums) sums[c] = value[i] + value[m + j];
  }
}

int product_key_topk(const float* first, const float* second, int64_t R, int64_t n, int64_t k, int32_t n_threads,
                     int64_t* index, float* sums) {
  const int64_t m = lesser(k, n);
  int64_t most = 0;  // pairs with (i + 1)(j + 1) <= k
  for (int64_t i = 0; i < m; i++) most += lesser(m, k / (i + 1));
  int failed = 0;
#pragma omp parallel num_threads(larger(1, n_threads))
  {
    uint64_t* keys = scratch_of<uint64_t>(kSlotRow, n + VL);
    int32_t* half = scratch_of<int32_t>(kSlotC, 2 * m + 1);
    float* value = scratch_of<float>(kSlotA, 2 * m + 1);
    uint64_t* pairs = scratch_of<uint64_t>(kSlotB, most + 1);
    const bool ready = keys && half && value && pairs;
    if (!ready) {
#pragma omp atomic write
      failed = 1;
    }
#pragma omp for schedule(static)
    for (int64_t r = 0; r < R; r++)
      if (ready)
        product_row(first + r * n, second + r * n, n, k, keys, half, value, pairs, index + r * k,
                    sums ? sums + r * k : nullptr);
  }
  return failed ? SPARSE_FFN_NO_MEMORY : SPARSE_FFN_OK;
}

// Activations of one row, and the magnitudes to rank by.
template <class T, class Act>
static void activate_row(const T* u, int64_t F, const float* norm, float* value, float* magnitude) {
  for (int64_t i = 0; i < F; i += VL) {
    const int64_t left = F - i;
    const V a = Act::value(load_upto(u + i, left));
    const V size = a < zero() ? -a : a;
    store_upto(value + i, a, left);
    store_upto(magnitude + i, norm ? size * load_upto(norm + i, left) : size, left);
  }
}
template <class T> using ActivateRowFn = void (*)(const T*, int64_t, const float*, float*, float*);
template <class T> static ActivateRowFn<T> activate_row_for(int activation) {
  switch (activation) {
    case SPARSE_FFN_RELU: return activate_row<T, Relu>;
    case SPARSE_FFN_GELU: return activate_row<T, Gelu>;
    case SPARSE_FFN_GELU_TANH: return activate_row<T, GeluTanh>;
    case SPARSE_FFN_SILU: return activate_row<T, Silu>;
    case SPARSE_FFN_IDENTITY: return activate_row<T, Identity>;
    default: return activate_row<T, SquaredRelu>;
  }
}

template <class T>
static int select_units(const T* u, int64_t rows, int64_t F, int64_t stride, int activation, const float* norm, int64_t k,
                        int n_threads, int64_t* index, T* kept) {
  const ActivateRowFn<T> activate = activate_row_for<T>(activation);
  int failed = 0;
#pragma omp parallel num_threads(larger(1, n_threads))
  {
    uint64_t* keys = scratch_of<uint64_t>(kSlotRow, F + VL);
    float* value = scratch_of<float>(kSlotA, F + VL);
    float* magnitude = scratch_of<float>(kSlotB, F + VL);
    const bool ready = keys && value && magnitude;
    if (!ready) {
#pragma omp atomic write
      failed = 1;
    }
#pragma omp for schedule(static)
    for (int64_t t = 0; t < rows; t++) {
      if (!ready) continue;
      activate(u + t * stride, F, norm, value, magnitude);
      select_row(magnitude, F, k, keys);
      for (int64_t j = 0; j < k; j++) {
        index[t * k + j] = index_of(keys[j]);
        from_float(value[index[t * k + j]], kept + t * k + j);
      }
    }
  }
  return failed ? SPARSE_FFN_NO_MEMORY : SPARSE_FFN_OK;
}

int topk_activation(const void* u, int64_t T, int64_t F, int64_t stride, int32_t dtype, int32_t activation,
                    const float* norm, int64_t k, int32_t n_threads, int64_t* index, void* kept) {
  const auto run = [&](auto example) {
    using S = decltype(example);
    return select_units(static_cast<const S*>(u), T, F, stride, activation, norm, k, n_threads, index,
                        static_cast<S*>(kept));
  };
  switch (dtype) {
    case SPARSE_FFN_FP32: return run(float{});
    case SPARSE_FFN_BF16: return run(bf16{});
    default: return run(fp16{});
  }
}

SPARSE_FFN_END
