// topk_hidden.cpp - TopKFFN between its two products: activates, selects, and writes the selected units as rows to gather, or
// as a row of the hidden layer that is zero elsewhere, for a dense product; and back.
#include "cut.h"
#include "ops.h"
#include "problem.h"
#include "vec_math.h"

SPARSE_FFN_BEGIN

constexpr int64_t kWord = 32;  // units whose selection one int32 holds

// Rounded to T, as if it had been stored.
template <class T> static ALWAYS_INLINE V rounded(V v) {
  if (sizeof(T) == 4) return v;
  alignas(64) T stored[VL];
  store(stored, v);
  return load(stored);
}
// All bits where the lane's bit is set.
static ALWAYS_INLINE VI spread(uint32_t lanes) {
  VI bit{};
  for (int j = 0; j < VL; j++) bit[j] = 1 << j;
  return ((VI{} + static_cast<int32_t>(lanes)) & bit) != 0;
}
static ALWAYS_INLINE V where(VI on, V v) { return reinterpret_cast<V>(on & reinterpret_cast<VI>(v)); }

struct Ranked {
  int64_t positive;
  int32_t most;
};

// One row's hidden units h [F], rounded where torch's ops would round, and their ranks, padded to whole words.
template <class T, class Act, bool kGlu>
static Ranked rank_row(const sparse_ffn_topk_hidden& p, int64_t t, int shift, T* h, int32_t* rank) {
  const T* up = static_cast<const T*>(p.up) + t * p.F;
  const T* glu_gate = kGlu ? static_cast<const T*>(p.glu_gate) + t * p.F : nullptr;
  const T* dropout_mask = p.dropout_mask ? static_cast<const T*>(p.dropout_mask) + t * p.F : nullptr;
  VI most = VI{} + kNoRank, positive{};
  for (int64_t i = 0; i < p.F; i += VL) {
    const int64_t left = p.F - i;
    V value = Act::value(load_upto((kGlu ? glu_gate : up) + i, left));
    if (!Act::saves_value) value = rounded<T>(value);
    if (kGlu) value = rounded<T>(value * load_upto(up + i, left));
    if (dropout_mask) value = rounded<T>(value * load_upto(dropout_mask + i, left));
    store_upto(h + i, value, left);
    VI r = rank_of(p.norm ? value * load_upto(p.norm + i, left) : value, shift);
    if (left < VL) r |= ~spread((1u << left) - 1);  // kNoRank
    store(reinterpret_cast<float*>(rank + i), reinterpret_cast<V>(r));
    most = r > most ? r : most;
    positive -= r > 0;
  }
  for (int64_t i = round_up(p.F, VL); i < round_up(p.F, kWord); i++) rank[i] = kNoRank;
  Ranked found{0, kNoRank};
  for (int j = 0; j < VL; j++) {
    found.positive += positive[j];
    found.most = larger(found.most, most[j]);
  }
  return found;
}
template <class T> using RankRowFn = Ranked (*)(const sparse_ffn_topk_hidden&, int64_t, int, T*, int32_t*);

// A bit for each unit: whether it is on the right side of the cut.
static inline void select_units(const int32_t* rank, int64_t F, Cut cut, uint32_t* selected) {
  for (int64_t w = 0; w < ceil_div(F, kWord); w++) {
    uint64_t above = 0, equal = 0;
    for (int v = 0; v < kWord; v += VL) {
      const VI r = load(rank + w * kWord + v);
      above |= static_cast<uint64_t>(lanes_of(r > cut.rank)) << v;
      equal |= static_cast<uint64_t>(lanes_of(r == cut.rank)) << v;
    }
    if (cut.equal == 0) equal = 0;
    while (__builtin_popcountll(equal) > cut.equal) equal &= ~(uint64_t{1} << (63 - __builtin_clzll(equal)));
    cut.equal -= __builtin_popcountll(equal);
    selected[w] = static_cast<uint32_t>(above | equal);
  }
}

// The selected units to index [K], in ascending order; F, which is none, where there are not as many.
static inline void list_selected(const uint32_t* selected, int64_t F, int64_t K, int64_t* index) {
  int64_t place = 0;
  for (int64_t w = 0; w < ceil_div(F, kWord); w++)
    for (uint32_t bits = selected[w]; bits && place < K; bits &= bits - 1) index[place++] = w * kWord + __builtin_ctz(bits);
  while (place < K) index[place++] = F;
}

// Bits of VL numbers, which no conversion may round to zero.
typedef uint16_t Half __attribute__((vector_size(VL * 2)));
static ALWAYS_INLINE VI load_bits(const float* p) { return load(reinterpret_cast<const int32_t*>(p)); }
template <class T> static ALWAYS_INLINE VI load_bits(const T* p) {
  Half h;
  memcpy(&h, p, sizeof h);
  return __builtin_convertvector(h, VI);
}
static ALWAYS_INLINE void copy_bits(const int32_t* from, int64_t n, float* to) { memcpy(to, from, static_cast<size_t>(n) * 4); }
template <class T> static ALWAYS_INLINE void copy_bits(const int32_t* from, int64_t n, T* to) {
  for (int64_t j = 0; j < n; j++) to[j].bits = static_cast<uint16_t>(from[j]);
}

// The selected numbers of row [F] to out [K]; packed: K + 2 VL of scratch.
template <class T>
static void keep(const T* row, const uint32_t* selected, int64_t F, int64_t K, int32_t* packed, T* out) {
  int64_t kept = 0, i = 0;
  for (; i + VL <= F; i += VL) {
    const uint32_t lanes = selected[i / kWord] >> (i % kWord) & ((uint64_t{1} << VL) - 1);
    compress(packed + kept, load_bits(row + i), lanes);
    kept += __builtin_popcount(lanes);
  }
  if (i < F) {
    T last[VL] = {};
    memcpy(last, row + i, static_cast<size_t>(F - i) * sizeof(T));
    compress(packed + kept, load_bits(last), selected[i / kWord] >> (i % kWord) & ((uint64_t{1} << VL) - 1));
  }
  copy_bits(packed, K, out);
}
// keep's inverse for one vector: the next numbers of `packed` where lanes are set, zero elsewhere.
static ALWAYS_INLINE V expand(const float* packed, uint32_t lanes) {
#if defined(__AVX512F__)
  return V(_mm512_maskz_expand_ps(static_cast<__mmask16>(lanes), _mm512_loadu_ps(packed)));
#else
  V v{};
  for (; lanes; lanes &= lanes - 1) v[__builtin_ctz(lanes)] = *packed++;
  return v;
#endif
}

template <class T> static int forward(const sparse_ffn_topk_hidden& p, const sparse_ffn_topk_hidden_out& out) {
  const RankRowFn<T> rank_units = with_activation(p.activation, [&](auto act) -> RankRowFn<T> {
    return p.glu_gate ? rank_row<T, decltype(act), true> : rank_row<T, decltype(act), false>;
  });
  // bits below a 16-bit number's last one are zero, unless a norm was multiplied with it
  const int shift = p.norm || sizeof(T) == 4 ? 0 : p.dtype == SPARSE_FFN_BF16 ? 16 : 13;
  const int64_t words = ceil_div(p.F, kWord), room = words * kWord + 2 * VL;
  int failed = 0;
#pragma omp parallel num_threads(larger(1, p.n_threads))
  {
    T* hidden = scratch_of<T>(kBufferA, room);
    int32_t* rank = scratch_of<int32_t>(kBufferRank, room);
    int32_t* part = scratch_of<int32_t>(kBufferIndex, room);
    uint32_t* bits = scratch_of<uint32_t>(kBufferB, words + 1);
    const bool ready = hidden && rank && part && bits;
    if (!ready) {
#pragma omp atomic write
      failed = 1;
    }
    int32_t guess = 0;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < p.T; t++) {
      if (!ready) continue;
      T* h = out.hidden ? static_cast<T*>(out.hidden) + t * p.F : hidden;
      const Ranked found = rank_units(p, t, shift, h, rank);
      const Cut cut = find_cut(rank, p.F, p.K, found.positive, found.most, guess, shift, part);
      guess = cut.rank;
      uint32_t* selected = out.selected ? reinterpret_cast<uint32_t*>(out.selected) + t * words : bits;
      select_units(rank, p.F, cut, selected);
      if (out.index) list_selected(selected, p.F, p.K, out.index + t * p.K);
      if (out.kept) keep(h, selected, p.F, p.K, part, static_cast<T*>(out.kept) + t * p.K);
      if (out.up) keep(static_cast<const T*>(p.up) + t * p.F, selected, p.F, p.K, part, static_cast<T*>(out.up) + t * p.K);
      if (out.glu_gate)
        keep(static_cast<const T*>(p.glu_gate) + t * p.F, selected, p.F, p.K, part, static_cast<T*>(out.glu_gate) + t * p.K);
      if (!out.hidden || p.K == p.F) continue;
      for (int64_t i = 0; i < p.F; i += VL) {
        const VI on = spread(selected[i / kWord] >> (i % kWord));
        store_upto(h + i, where(on, load_upto(h + i, p.F - i)), p.F - i);
      }
    }
  }
  return failed ? SPARSE_FFN_NO_MEMORY : SPARSE_FFN_OK;
}

int topk_hidden_forward(const sparse_ffn_topk_hidden& p, const sparse_ffn_topk_hidden_out& out) {
  return with_dtype(p.dtype, [&](auto example) { return forward<decltype(example)>(p, out); });
}

// One row: h, and the gradients of up and glu_gate from that of h, all [F] and zero where a unit is not selected.
template <class T, class Act, bool kGlu>
static void back_row(const sparse_ffn_topk_kept& p, int64_t t, const float* up, const float* glu_gate, const T* dh, T* h,
                     T* d_up, T* d_glu_gate) {
  const uint32_t* selected = reinterpret_cast<const uint32_t*>(p.selected) + t * ceil_div(p.F, kWord);
  const T* dropout_mask = p.dropout_mask ? static_cast<const T*>(p.dropout_mask) + t * p.F : nullptr;
  for (int64_t i = 0; i < p.F; i += VL) {
    const int64_t left = p.F - i;
    const uint32_t lanes = selected[i / kWord] >> (i % kWord) & ((uint64_t{1} << VL) - 1);
    const VI on = spread(lanes);
    const V u = expand(up, lanes), dropout = dropout_mask ? load_upto(dropout_mask + i, left) : splat(1.f);
    const V upstream = load_upto(dh + i, left) * dropout;
    V a, d;
    if constexpr (kGlu) {
      Act::both(expand(glu_gate, lanes), upstream * u, a, d);
      store_upto(d_glu_gate + i, where(on, d), left);
      d = upstream * a;
      a = a * u;
      glu_gate += __builtin_popcount(lanes);
    } else {
      Act::both(u, upstream, a, d);
    }
    store_upto(d_up + i, where(on, d), left);  // dh may be the same row
    store_upto(h + i, where(on, a * dropout), left);
    up += __builtin_popcount(lanes);
  }
}
template <class T>
using BackRowFn = void (*)(const sparse_ffn_topk_kept&, int64_t, const float*, const float*, const T*, T*, T*, T*);

template <class T> static void widen_row(const T* row, int64_t n, float* wide) {
  for (int64_t j = 0; j < n; j += VL) store(wide + j, load_upto(row + j, n - j));
}

template <class T>
static int backward(const sparse_ffn_topk_kept& p, const T* dh, T* h, T* d_up, T* d_glu_gate) {
  const BackRowFn<T> back = with_activation(p.activation, [&](auto act) -> BackRowFn<T> {
    return p.glu_gate ? back_row<T, decltype(act), true> : back_row<T, decltype(act), false>;
  });
  int failed = 0;
#pragma omp parallel num_threads(larger(1, p.n_threads))
  {
    const int64_t room = round_up(p.F, kWord) + 2 * VL;  // for as many as have a bit, if more than K
    float* up = scratch_of<float>(kBufferA, room);
    float* glu_gate = scratch_of<float>(kBufferB, room);
    const bool ready = up && glu_gate;
    if (!ready) {
#pragma omp atomic write
      failed = 1;
    }
#pragma omp for schedule(static)
    for (int64_t t = 0; t < p.T; t++) {
      if (!ready) continue;
      widen_row(static_cast<const T*>(p.up) + t * p.K, p.K, up);
      if (p.glu_gate) widen_row(static_cast<const T*>(p.glu_gate) + t * p.K, p.K, glu_gate);
      back(p, t, up, glu_gate, dh + t * p.F, h + t * p.F, d_up + t * p.F, p.glu_gate ? d_glu_gate + t * p.F : nullptr);
    }
  }
  return failed ? SPARSE_FFN_NO_MEMORY : SPARSE_FFN_OK;
}

int topk_hidden_backward(const sparse_ffn_topk_kept& p, const void* dh, void* h, void* d_up, void* d_glu_gate) {
  return with_dtype(p.dtype, [&](auto example) {
    using T = decltype(example);
    return backward(p, static_cast<const T*>(dh), static_cast<T*>(h), static_cast<T*>(d_up), static_cast<T*>(d_glu_gate));
  });
}

int topk_index(const int32_t* selected, int64_t T, int64_t F, int64_t K, int32_t n_threads, int64_t* index) {
#pragma omp parallel for num_threads(larger(1, n_threads)) schedule(static)
  for (int64_t t = 0; t < T; t++)
    list_selected(reinterpret_cast<const uint32_t*>(selected) + t * ceil_div(F, kWord), F, K, index + t * K);
  return SPARSE_FFN_OK;
}

SPARSE_FFN_END
