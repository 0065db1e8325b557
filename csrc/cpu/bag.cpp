// bag.cpp - the weighted bag: out[t] = sum_j weight[t,j] * values[index[t,j]], and its gradients.
// Gathering rows costs one read of a row from L3 or memory for each slot. Where rows are shared by several slots the
// work goes by value row instead, over the sorted slots and over a block of columns at a time: the table streams by
// once, and what is met at random, the tokens' sums or output gradients, is a compact block that stays in L2.
// Threads own output columns (forward) or value rows (backward), so nothing is atomic and the result does not depend on
// the number of threads.
#include "ops.h"
#include "bag_slots.h"
#include "vec.h"

SPARSE_FFN_BEGIN

static constexpr int kBlockVectors = 4;                   // of a row, kept in registers: with as many sums beside them
static constexpr int64_t kBlock = kBlockVectors * VL;     // columns in a block
static constexpr int64_t kChunkTokens = 512 * 1024 / (kBlock * 4);  // tokens whose block is half of an L2 of 1 MB
static constexpr int64_t kListAhead = 4;                  // value rows fetched before their turn
static constexpr int64_t kSharing = 4;                    // slots a row, from which sorting pays
static constexpr int64_t kSmallTable = 4 << 20;           // bytes, up to which rows come from L2 often enough
static constexpr int kGatherVectors = 8;                  // of a row, summed in registers at a time by gathering
static constexpr int64_t kDotSlots = 64;                  // a thread's share, of the weights' gradient by gathering

// The first `slots` of token t; kVectors whole vectors of columns from `first` on, 0: any number of columns up to
// kGatherVectors vectors.
template <class T, int kVectors>
static void gather_row(const sparse_ffn_bag& p, int64_t t, int64_t slots, int64_t first, int64_t columns, T* out) {
  const T* values = static_cast<const T*>(p.values) + first;
  const T* weight = static_cast<const T*>(p.weight) + t * p.J;
  const int64_t* index = p.index + t * p.J;
  V acc[kVectors ? kVectors : kGatherVectors] = {};
  for (int64_t j = 0; j < slots; j++) {
    if (j + kListAhead < slots)
      for (int64_t i = 0; i < columns * static_cast<int64_t>(sizeof(T)); i += 64)
        prefetch(reinterpret_cast<const char*>(values + index[j + kListAhead] * p.O) + i);
    const V w = splat(to_float(weight[j]));
    const T* row = values + index[j] * p.O;
    if constexpr (kVectors > 0) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; v++) acc[v] = fma(w, load(row + v * VL), acc[v]);
    } else {
      for (int64_t i = 0; i < columns; i += VL) acc[i / VL] = fma(w, load_upto(row + i, columns - i), acc[i / VL]);
    }
  }
  for (int64_t i = 0; i < columns; i += VL) store_upto(out + i, acc[i / VL], columns - i);
}
template <class T> using GatherRowFn = void (*)(const sparse_ffn_bag&, int64_t, int64_t, int64_t, int64_t, T*);
template <class T> static GatherRowFn<T> gather_row_for(int64_t columns) {
  static constexpr GatherRowFn<T> whole[] = {gather_row<T, 1>, gather_row<T, 2>, gather_row<T, 3>, gather_row<T, 4>,
                                             gather_row<T, 5>, gather_row<T, 6>, gather_row<T, 7>, gather_row<T, 8>};
  return columns % VL ? gather_row<T, 0> : whole[columns / VL - 1];
}

static ALWAYS_INLINE bool is_zero(float x) { return x == 0; }
template <class T> static ALWAYS_INLINE bool is_zero(T x) { return !(x.bits & 0x7fff); }

// The same bags with each token's slots of weight zero behind its others, of which there are slots[t].
template <class T> static bool leave_zeros_out(sparse_ffn_bag* p, const int32_t** slots) {
  int64_t* index = scratch_of<int64_t>(kBufferOrder, p->T * p->J + 1);
  T* weight = scratch_of<T>(kBufferGate, p->T * p->J + 1);
  int32_t* counts = scratch_of<int32_t>(kBufferOffsets, p->T + 1);
  if (!index || !weight || !counts) return false;
  const T* given = static_cast<const T*>(p->weight);
  for (int64_t t = 0; t < p->T; t++) {
    int64_t used = t * p->J;
    for (int64_t s = t * p->J; s < (t + 1) * p->J; s++) {
      index[used] = p->index[s], weight[used] = given[s];
      used += !is_zero(given[s]);
    }
    counts[t] = static_cast<int32_t>(used - t * p->J);
  }
  p->index = index, p->weight = weight, *slots = counts;
  return true;
}

template <class T> static void forward_gather(const sparse_ffn_bag& p, const int32_t* slots, T* out) {
  const int64_t threads = larger(1, p.n_threads), vectors = ceil_div(p.O, VL);
  int64_t pieces = ceil_div(vectors, kGatherVectors);
  if (p.T < threads) pieces = lesser(vectors, round_up(pieces, threads));  // of few tokens threads take equal columns
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static)
  for (int64_t i = 0; i < p.T * pieces; i++) {
    const int64_t t = i / pieces, piece = i % pieces;
    const int64_t first = vectors * piece / pieces * VL, last = lesser(p.O, vectors * (piece + 1) / pieces * VL);
    gather_row_for<T>(last - first)(p, t, slots ? slots[t] : p.J, first, last - first, out + t * p.O + first);
  }
}

// Columns of a row into registers; those past the end are zero.
template <class T> static ALWAYS_INLINE void load_block(const T* row, int64_t columns, V* v) {
  if (columns == kBlock) {
#pragma GCC unroll 8
    for (int i = 0; i < kBlockVectors; i++) v[i] = load(row + i * VL);
  } else {
    for (int i = 0; i < kBlockVectors; i++)
      v[i] = columns > i * VL ? load_upto(row + i * VL, columns - i * VL) : zero();
  }
}
template <class T> static ALWAYS_INLINE void store_block(T* row, int64_t columns, const V* v) {
  if (columns == kBlock) {
#pragma GCC unroll 8
    for (int i = 0; i < kBlockVectors; i++) store(row + i * VL, v[i]);
  } else {
    for (int i = 0; i < kBlockVectors; i++)
      if (columns > i * VL) store_upto(row + i * VL, v[i], columns - i * VL);
  }
}
template <class T> static ALWAYS_INLINE void prefetch_block(const T* row) {
  for (int64_t b = 0; b < kBlock * static_cast<int64_t>(sizeof(T)); b += 64)
    prefetch(reinterpret_cast<const char*>(row) + b);
}

// One block of columns of `tokens` outputs; sums: [tokens, kBlock] of scratch.
template <class T>
static void forward_block(const sparse_ffn_bag& p, const SortedSlots& s, int64_t first, int64_t tokens, float* sums,
                          T* out) {
  const int64_t columns = lesser(kBlock, p.O - first);
  const T* values = static_cast<const T*>(p.values) + first;
  memset(sums, 0, static_cast<size_t>(tokens * kBlock) * 4);
  for (int64_t n = 0; n < p.N; n++) {
    if (n + kListAhead < p.N) prefetch_block(values + (n + kListAhead) * p.O);
    const int64_t last = s.begin[n + 1];
    V v[kBlockVectors];
    load_block(values + n * p.O, columns, v);
    for (int64_t i = s.begin[n]; i < last; i++) {
      const V w = splat(s.weight[i]);
      float* sum = sums + int64_t{s.token[i]} * kBlock;
#pragma GCC unroll 8
      for (int j = 0; j < kBlockVectors; j++) store(sum + j * VL, fma(w, v[j], load(sum + j * VL)));
    }
  }
  for (int64_t t = 0; t < tokens; t++) {
    V v[kBlockVectors];
    load_block(sums + t * kBlock, kBlock, v);
    store_block(out + t * p.O + first, columns, v);
  }
}

template <class T> static bool gathers(const sparse_ffn_bag& p) {
  return p.T * p.J < kSharing * p.N || p.N * p.O * static_cast<int64_t>(sizeof(T)) <= kSmallTable;
}

template <class T> static int forward(const sparse_ffn_bag& p, T* out) {
  int failed = 0;
  for (int64_t t0 = 0; t0 < p.T; t0 += kChunkTokens) {
    sparse_ffn_bag c = p;
    c.T = lesser(kChunkTokens, p.T - t0);
    c.index += t0 * p.J;
    c.weight = static_cast<const T*>(p.weight) + t0 * p.J;
    T* chunk = out + t0 * p.O;
    if (gathers<T>(c)) {
      const int32_t* slots = nullptr;
      if (p.skip_zeros && !leave_zeros_out<T>(&c, &slots)) return SPARSE_FFN_NO_MEMORY;
      forward_gather(c, slots, chunk);
      continue;
    }
    const SortedSlots s = SortedSlots::reserve(c);
    if (!s.ready()) return SPARSE_FFN_NO_MEMORY;
    sort_bag_slots<T>(c, s);
#pragma omp parallel num_threads(larger(1, p.n_threads))
    {
      float* sums = scratch_of<float>(kBufferAcc, c.T * kBlock);
      if (!sums) {
#pragma omp atomic write
        failed = 1;
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t first = 0; first < p.O; first += kBlock)
        if (sums) forward_block(c, s, first, c.T, sums, chunk);
    }
  }
  return failed ? SPARSE_FFN_NO_MEMORY : SPARSE_FFN_OK;
}

// One block of columns of a value row: its own gradient, and its slots' dot products with the output gradients, added
// to dots (by sorted position) or written at the first block.
template <class T, bool kDots>
static ALWAYS_INLINE void backward_block(const int32_t* token, const float* weight, int64_t slots, const float* dout,
                                         const V* value, V* sums, float* dots, bool add) {
  const auto one = [&](int64_t i) {
    const float* d = dout + int64_t{token[i]} * kBlock;
    const V w = splat(weight[i]);
    V dot = zero();
#pragma GCC unroll 8
    for (int j = 0; j < kBlockVectors; j++) {
      const V dv = load(d + j * VL);
      sums[j] = fma(w, dv, sums[j]);
      if (kDots) dot = j ? fma(dv, value[j], dot) : dv * value[j];
    }
    return dot;
  };
  int64_t i = 0;
  for (; i + 4 <= slots; i += 4) {
    const V a = one(i), b = one(i + 1), c = one(i + 2), d = one(i + 3);
    if (kDots) sum4(a, b, c, d, dots + i, add);
  }
  for (; i < slots; i++) {
    const V a = one(i);
    if (kDots) dots[i] = (add ? dots[i] : 0.f) + sum(a);
  }
}

// Blocks of columns for which one pass over the value rows is made: of few tokens all, so that a row is written at once.
static int64_t blocks_in_pass(const sparse_ffn_bag& p) {
  return larger<int64_t>(1, lesser(ceil_div(p.O, kBlock), kChunkTokens / larger<int64_t>(1, p.T)));
}

// All slots of value rows n0 .. n1-1. packed: [blocks_in_pass, T, kBlock] of scratch; dots [S] by sorted position, or null.
template <class T>
static void backward_rows(const sparse_ffn_bag& p, const SortedSlots& s, int64_t n0, int64_t n1, const T* dout,
                          T* dvalues, const int32_t* place, float* packed, float* dots) {
  const T* values = static_cast<const T*>(p.values);
  const int64_t pass = blocks_in_pass(p) * kBlock;
  for (int64_t first = 0; first < p.O; first += pass) {
    const int64_t last = lesser(p.O, first + pass);
    V v[kBlockVectors];
    for (int64_t c = first; c < last; c += kBlock)
      for (int64_t t = 0; t < p.T; t++) {
        load_block(dout + t * p.O + c, lesser(kBlock, last - c), v);
        store_block(packed + (c - first) * p.T + t * kBlock, kBlock, v);
      }
    for (int64_t n = n0; n < n1; n++) {
      const int64_t begin = s.begin[n], slots = s.begin[n + 1] - begin;
      T* dvalue = dvalues && (slots || !place) ? dvalues + (place ? place[n] : n) * p.O : nullptr;
      const int64_t ahead = lesser(n + kListAhead, n1 - 1);
      if (dots && s.begin[ahead + 1] > s.begin[ahead])
        for (int64_t c = first; c < last; c += kBlock) prefetch_block(values + ahead * p.O + c);
      if (!slots) {
        if (dvalue) memset(dvalue + first, 0, static_cast<size_t>(last - first) * sizeof(T));
        continue;
      }
      for (int64_t c = first; c < last; c += kBlock) {
        const int64_t columns = lesser(kBlock, last - c);
        const float* d = packed + (c - first) * p.T;
        V sums[kBlockVectors] = {};
        if (dots) {
          load_block(values + n * p.O + c, columns, v);
          backward_block<T, true>(s.token + begin, s.weight + begin, slots, d, v, sums, dots + begin, c > 0);
        } else {
          backward_block<T, false>(s.token + begin, s.weight + begin, slots, d, v, sums, nullptr, false);
        }
        if (dvalue) store_block(dvalue + c, columns, sums);
      }
    }
  }
}

// Slots j0 .. j1-1 of token t: the dot products of their rows with its output gradient.
template <class T>
static void gather_dots(const sparse_ffn_bag& p, int64_t t, int64_t j0, int64_t j1, const T* dout, T* dweight) {
  const T* values = static_cast<const T*>(p.values);
  const int64_t* index = p.index + t * p.J;
  for (int64_t j = j0; j < j1; j += 4) {
    const T *row[4], *ahead[4];
    for (int64_t r = 0; r < 4; r++) {
      row[r] = values + index[lesser(j + r, j1 - 1)] * p.O;
      ahead[r] = values + index[lesser(j + r + 4, p.J - 1)] * p.O;
    }
    V acc[4] = {};
    int64_t i = 0;
    for (; i + VL <= p.O; i += VL) {
      const V d = load(dout + t * p.O + i);
#pragma GCC unroll 4
      for (int r = 0; r < 4; r++) {
        acc[r] = fma(d, load(row[r] + i), acc[r]);
        prefetch(ahead[r] + i);
      }
    }
    if (const int left = static_cast<int>(p.O - i))
      for (int r = 0; r < 4; r++) acc[r] = fma(load_n(dout + t * p.O + i, left), load_n(row[r] + i, left), acc[r]);
    for (int64_t r = 0; r < 4 && j + r < j1; r++) from_float(sum(acc[r]), dweight + t * p.J + j + r);
  }
}

template <class T> static void backward_gather(const sparse_ffn_bag& p, const T* dout, T* dweight) {
  const int64_t parts = ceil_div(p.J, kDotSlots);
#pragma omp parallel for num_threads(larger(1, p.n_threads)) schedule(static)
  for (int64_t i = 0; i < p.T * parts; i++) {
    const int64_t t = i / parts, j = i % parts * kDotSlots;
    gather_dots(p, t, j, lesser(p.J, j + kDotSlots), dout, dweight);
  }
}

// sparse_rows negative: dvalues is [N, O]; else [sparse_rows, O], see sparse_ffn_bag_backward_sparse.
template <class T>
static int backward(const sparse_ffn_bag& p, const T* dout, T* dweight, T* dvalues, int64_t sparse_rows) {
  const int64_t S = p.T * p.J;
  const bool sparse = sparse_rows >= 0;
  if (!sparse && !dvalues && gathers<T>(p)) {
    if (dweight) backward_gather(p, dout, dweight);
    return SPARSE_FFN_OK;
  }
  // value row -> its row in the sparse gradient
  int32_t* place = sparse ? scratch_of<int32_t>(kBufferAux, p.N + 1) : nullptr;
  float* dots = dweight ? scratch_of<float>(kBufferDgate, S + 1) : nullptr;
  const SortedSlots s = SortedSlots::reserve(p);
  if ((sparse && !place) || (dweight && !dots) || !s.ready()) return SPARSE_FFN_NO_MEMORY;
  sort_bag_slots<T>(p, s);
  if (sparse) {
    int32_t used = 0;
    for (int64_t n = 0; n < p.N; n++) {
      place[n] = used;
      used += s.begin[n + 1] > s.begin[n];
    }
    if (used != sparse_rows) return SPARSE_FFN_BAD_ARGUMENT;
  }
  if (dweight && !p.O) memset(dweight, 0, static_cast<size_t>(S) * sizeof(T));
  int failed = 0;
#pragma omp parallel num_threads(larger(1, p.n_threads))
  {
    const int64_t i = thread_index(), n = thread_count();
    const int64_t n0 = s.part(p.N, i, n), n1 = s.part(p.N, i + 1, n);
    float* packed = scratch_of<float>(kBufferAcc, blocks_in_pass(p) * p.T * kBlock + 1);
    if (packed && p.O) {
      backward_rows(p, s, n0, n1, dout, dvalues, place, packed, dots);
      if (dweight)
        for (int64_t k = s.begin[n0]; k < s.begin[n1]; k++) from_float(dots[k], dweight + s.order[k]);
    } else if (!packed) {
#pragma omp atomic write
      failed = 1;
    }
    limit_own_scratch();
  }
  return failed ? SPARSE_FFN_NO_MEMORY : SPARSE_FFN_OK;
}

int bag_forward(const sparse_ffn_bag& p, void* out) {
  return with_dtype(p.dtype, [&](auto example) { return forward(p, static_cast<decltype(example)*>(out)); });
}

int bag_backward(const sparse_ffn_bag& p, const void* dout, void* dweight, void* dvalues, int64_t sparse_rows) {
  const auto run = [&](auto example) {
    using T = decltype(example);
    return backward<T>(p, static_cast<const T*>(dout), static_cast<T*>(dweight), static_cast<T*>(dvalues), sparse_rows);
  };
  return with_dtype(p.dtype, run);
}

SPARSE_FFN_END
