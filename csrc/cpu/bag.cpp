// bag.cpp - the weighted bag: out[t] = sum_j weight[t,j] * values[index[t,j]], and its gradients.
// The backward sorts the slots by value row. One pass over the sorted list then reads each used value row once and gives
// both gradients: dweight is a dot product with it, dvalues sums weight * dout in the order of the slots. Threads own
// value rows, so nothing is atomic and the result does not depend on the number of threads.
#include <omp.h>

#include "ops.h"
#include "vec.h"

SPARSE_FFN_BEGIN

static constexpr int64_t kBagColumns = 8 * VL;  // columns summed in registers at a time

template <class T> static void bag_row(const sparse_ffn_bag& p, int64_t t, int64_t first, int64_t columns, T* out) {
  const T* values = static_cast<const T*>(p.values) + first;
  const T* weight = static_cast<const T*>(p.weight) + t * p.J;
  const int64_t* index = p.index + t * p.J;
  V acc[8] = {};
  for (int64_t j = 0; j < p.J; j++) {
    if (j + 4 < p.J)
      for (int64_t i = 0; i < columns * static_cast<int64_t>(sizeof(T)); i += 64)
        prefetch(reinterpret_cast<const char*>(values + index[j + 4] * p.O) + i);
    const V w = splat(to_float(weight[j]));
    const T* row = values + index[j] * p.O;
    if (columns == kBagColumns) {
#pragma GCC unroll 8
      for (int v = 0; v < 8; v++) acc[v] = fma(w, load(row + v * VL), acc[v]);
    } else {
      for (int64_t i = 0; i < columns; i += VL) acc[i / VL] = fma(w, load_upto(row + i, columns - i), acc[i / VL]);
    }
  }
  for (int64_t i = 0; i < columns; i += VL) store_upto(out + i, acc[i / VL], columns - i);
}

template <class T> static int forward(const sparse_ffn_bag& p, T* out) {
#pragma omp parallel for num_threads(larger(1, p.n_threads)) schedule(static)
  for (int64_t t = 0; t < p.T; t++)
    for (int64_t first = 0; first < p.O; first += kBagColumns)
      bag_row(p, t, first, lesser(kBagColumns, p.O - first), out + t * p.O + first);
  return SPARSE_FFN_OK;
}

// Stable counting sort of the slots by value row. order [S]; begin [N + 1].
static void sort_slots(const int64_t* index, int64_t S, int64_t N, int32_t* order, int32_t* begin) {
  memset(begin, 0, static_cast<size_t>(N + 1) * 4);
  for (int64_t s = 0; s < S; s++) begin[index[s]]++;
  int32_t total = 0;
  for (int64_t n = 0; n <= N; n++) {
    const int32_t count = begin[n];
    begin[n] = total;
    total += count;
  }
  for (int64_t s = 0; s < S; s++) order[begin[index[s]]++] = static_cast<int32_t>(s);
  for (int64_t n = N; n > 0; n--) begin[n] = begin[n - 1];
  begin[0] = 0;
}

// One value row: its slots' weight gradients and its own gradient (sum_row [padded O] is scratch).
template <class T>
static void backward_row(const sparse_ffn_bag& p, const int32_t* order, int64_t slots, const T* dout, const T* value,
                         T* dweight, T* dvalue, float* sum_row) {
  const T* weight = static_cast<const T*>(p.weight);
  const uint32_t J = static_cast<uint32_t>(p.J);
  if (dvalue) memset(sum_row, 0, static_cast<size_t>(round_up(p.O, VL)) * 4);
  for (int64_t i = 0; i < slots; i++) {
    if (i + 2 < slots) {
      const char* ahead = reinterpret_cast<const char*>(dout + static_cast<uint32_t>(order[i + 2]) / J * p.O);
      for (int64_t b = 0; b < p.O * static_cast<int64_t>(sizeof(T)); b += 64) prefetch(ahead + b);
    }
    const int64_t s = order[i];
    const T* d = dout + static_cast<uint32_t>(s) / J * p.O;
    const V w = splat(to_float(weight[s]));
    V dot[2] = {};
    for (int64_t c = 0; c < p.O; c += VL) {
      const int64_t left = p.O - c;
      const V dv = load_upto(d + c, left);
      if (dweight) dot[c / VL & 1] = fma(dv, load_upto(value + c, left), dot[c / VL & 1]);
      if (dvalue) store(sum_row + c, fma(w, dv, load(sum_row + c)));
    }
    if (dweight) from_float(sum(dot[0] + dot[1]), dweight + s);
  }
  if (dvalue)
    for (int64_t c = 0; c < p.O; c += VL) store_upto(dvalue + c, load(sum_row + c), p.O - c);
}

// rows null: dvalues is [N, O]; else row-sparse, see sparse_ffn_bag_backward_sparse.
template <class T>
static int backward(const sparse_ffn_bag& p, const T* dout, T* dweight, T* dvalues, int64_t* rows, int64_t* n_rows) {
  const int64_t S = p.T * p.J;
  int32_t* order = scratch_of<int32_t>(kSlotOrder, S + 1);
  int32_t* begin = scratch_of<int32_t>(kSlotOffsets, p.N + 1);
  int32_t* place = rows ? scratch_of<int32_t>(kSlotAux, p.N + 1) : nullptr;  // value row -> its row in the sparse gradient
  if (!order || !begin || (rows && !place)) return SPARSE_FFN_NO_MEMORY;
  sort_slots(p.index, S, p.N, order, begin);
  if (rows) {
    int64_t used = 0;
    for (int64_t n = 0; n < p.N; n++) {
      place[n] = static_cast<int32_t>(used);
      if (begin[n + 1] > begin[n]) rows[used++] = n;
    }
    *n_rows = used;
  } else if (dvalues) {
    advise_huge_pages(dvalues, static_cast<size_t>(p.N * p.O) * sizeof(T));
  }
  int failed = 0;
#pragma omp parallel num_threads(larger(1, p.n_threads))
  {
    float* sum_row = scratch_of<float>(kSlotRow, round_up(p.O, VL));
    if (!sum_row) {
#pragma omp atomic write
      failed = 1;
    }
#pragma omp for schedule(dynamic, 64)
    for (int64_t n = 0; n < p.N; n++) {
      if (!sum_row) continue;
      const int64_t slots = begin[n + 1] - begin[n];
      T* dvalue = dvalues ? dvalues + (rows ? place[n] : n) * p.O : nullptr;
      if (slots)
        backward_row(p, order + begin[n], slots, dout, static_cast<const T*>(p.values) + n * p.O, dweight, dvalue, sum_row);
      else if (dvalue && !rows)
        memset(dvalue, 0, static_cast<size_t>(p.O) * sizeof(T));
    }
  }
  return failed ? SPARSE_FFN_NO_MEMORY : SPARSE_FFN_OK;
}

int bag_forward(const sparse_ffn_bag& p, void* out) {
  switch (p.dtype) {
    case SPARSE_FFN_FP32: return forward(p, static_cast<float*>(out));
    case SPARSE_FFN_BF16: return forward(p, static_cast<bf16*>(out));
    default: return forward(p, static_cast<fp16*>(out));
  }
}

int bag_backward(const sparse_ffn_bag& p, const void* dout, void* dweight, void* dvalues, int64_t* rows, int64_t* n_rows) {
  const auto run = [&](auto example) {
    using T = decltype(example);
    return backward<T>(p, static_cast<const T*>(dout), static_cast<T*>(dweight), static_cast<T*>(dvalues), rows, n_rows);
  };
  switch (p.dtype) {
    case SPARSE_FFN_FP32: return run(float{});
    case SPARSE_FFN_BF16: return run(bf16{});
    default: return run(fp16{});
  }
}

SPARSE_FFN_END
