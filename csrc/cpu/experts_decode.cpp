// experts_decode.cpp - the expert FFN for a few tokens, where reading the weights is the whole cost. Nothing is packed:
// threads own hidden units, then output columns, of every touched expert, in one parallel region with one barrier. With an
// activation that gives zeros, the rows of units that are zero for all tokens of an expert are not read: those of values,
// and in a GLU those of keys, since the gate comes first. So what is not finite there is not met.
#include "experts.h"
#include "gemm_scatter.h"
#include "hidden.h"
#include "threads.h"

SPARSE_FFN_BEGIN

// The numbers i < n for which used(i), in order, and kListAhead more to fetch. Returns how many.
template <class F> static int64_t list_used(int64_t n, int32_t* list, const F& used) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; i++) {
    list[count] = static_cast<int32_t>(i);
    count += used(i);
  }
  for (int64_t i = 0; i < kListAhead; i++) list[count + i] = count ? list[count - 1] : 0;
  return count;
}

static ALWAYS_INLINE bool is_zero(float x) { return x == 0; }
template <class T> static ALWAYS_INLINE bool is_zero(T x) { return !(x.bits & 0x7fff); }

// Of a row of hidden units those of a list, into row r of a row-packed panel.
template <class T> static void pack_listed(float* panel, int r, const T* src, const int32_t* list, int64_t count) {
  float* dst = panel + r * kRowStride;
  if constexpr (kDirectProduct<T> == Product::kPaired) {
    T* pairs = reinterpret_cast<T*>(dst);
    for (int64_t j = 0; j < count; j++) pairs[j] = src[list[j]];
    if (count & 1) pairs[count] = T{};
  } else {
    for (int64_t j = 0; j < count; j++) dst[j] = to_float(src[list[j]]);
  }
}

// Products with the keys, and in a GLU with the gate's: c [rows, 2 n]. Where a list is given, keys of units whose gate
// gives zero for all rows are not read, and their products are 0.
template <class T>
static void multiply_up(const T* const* a, int rows, const T* keys, const T* gate_keys, int64_t D, int64_t n,
                        int32_t* list, float* c) {
  if (gate_keys) dot_panel(a, rows, gate_keys, D, D, int64_t{0}, n, c + n, 2 * n);
  if (!gate_keys || !list) {
    dot_panel(a, rows, keys, D, D, int64_t{0}, n, c, 2 * n);
    return;
  }
  const int64_t count = list_used(n, list, [&](int64_t i) {
    bool used = false;
    for (int r = 0; r < rows; r++) used |= !(c[(2 * r + 1) * n + i] <= 0);
    return used;
  });
  for (int r = 0; r < rows; r++) memset(c + 2 * r * n, 0, static_cast<size_t>(n) * 4);
  dot_listed(a, rows, keys, D, list, count, D, c, 2 * n);
}

// Hidden units g0 .. g1-1 of all slots: h [S, G].
template <class T>
static void decode_up(const sparse_ffn_experts& p, const SlotTables& slots, HiddenForwardFn<T> activate, int64_t g0,
                      int64_t g1, int32_t* list, float* c, T* h) {
  const T* x = static_cast<const T*>(p.x);
  const T* bias = static_cast<const T*>(p.key_bias);
  const T* dropout_mask = static_cast<const T*>(p.dropout_mask);
  const int64_t n = g1 - g0;
  for (int64_t e = 0; e < p.E; e++) {
    const int64_t last = p.offsets[e + 1];
    for (int64_t s0 = p.offsets[e]; s0 < last; s0 += kMr) {
      const int mr = static_cast<int>(lesser<int64_t>(kMr, last - s0));
      const T* a[kMr];
      for (int r = 0; r < mr; r++) a[r] = x + slots.token[s0 + r] * p.x_stride;
      const int64_t w0 = (e * p.G + g0) * p.D;
      const T* gate_keys = p.gate_keys ? static_cast<const T*>(p.gate_keys) + w0 : nullptr;
      multiply_up(a, mr, static_cast<const T*>(p.keys) + w0, gate_keys, p.D, n, list, c);
      for (int r = 0; r < mr; r++) {
        HiddenForward<T> f{};
        f.c_up = c + r * 2 * n;
        f.c_glu_gate = f.c_up + n;
        f.bias = bias ? bias + e * p.G + g0 : nullptr;
        f.dropout_mask = dropout_mask ? dropout_mask + p.order[s0 + r] * p.G + g0 : nullptr;
        f.h = h + (s0 + r) * p.G + g0;
        f.n = n;
        activate(f);
      }
    }
  }
}

// Output columns n0 .. n1-1 of all tokens; acc is [T, padded].
template <class T>
static void decode_down(const sparse_ffn_experts& p, const SlotTables& slots, int64_t n0, int64_t n1, const T* h,
                        int32_t* list, float* pa, float* tail, float* acc, T* out) {
  const int64_t columns = n1 - n0, padded = round_up(columns, VL);
  memset(acc, 0, static_cast<size_t>(p.T * padded) * 4);
  for (int64_t e = 0; e < p.E; e++) {
    const int64_t last = p.offsets[e + 1];
    const T* w = static_cast<const T*>(p.values) + e * p.G * p.O + n0;
    for (int64_t s0 = p.offsets[e]; s0 < last; s0 += kMr) {
      const int mr = static_cast<int>(lesser<int64_t>(kMr, last - s0));
      const T* rows = h + s0 * p.G;
      const TileOut tile{acc, padded, slots.token + s0, slots.gate + s0, 0};
      if (!list) {
        for (int r = 0; r < mr; r++) pack_row<T, kDirectProduct<T>>(pa, r, rows + r * p.G, p.G);
        scatter_direct(mr, p.G, columns, pa, w, p.O, nullptr, tail, tile);
        continue;
      }
      for (int64_t k0 = 0; k0 < p.G; k0 += kDirectBlock<T>, rows += kDirectBlock<T>) {
        const int64_t count = list_used(lesser(kDirectBlock<T>, p.G - k0), list, [&](int64_t i) {
          bool used = false;
          for (int r = 0; r < mr; r++) used |= !is_zero(rows[r * p.G + i]);
          return used;
        });
        if (!count) continue;
        for (int r = 0; r < mr; r++) pack_listed(pa, r, rows + r * p.G, list, count);
        scatter_direct(mr, count, columns, pa, w + k0 * p.O, p.O, list, tail, tile);
      }
    }
  }
  for (int64_t t = 0; t < p.T; t++)
    for (int64_t j = 0; j < columns; j += VL)
      store_upto(out + t * p.O + n0 + j, load(acc + t * padded + j), columns - j);
}

template <class T> static int decode(const sparse_ffn_experts& p, T* out) {
  SlotTables slots;
  if (!fill_slot_tables(p, &slots)) return SPARSE_FFN_NO_MEMORY;
  T* h = scratch_of<T>(kBufferHidden, p.T * p.K * p.G + 1);
  if (!h) return SPARSE_FFN_NO_MEMORY;
  const HiddenForwardFn<T> activate = hidden_forward_for<T>(p.activation, p.gate_keys != nullptr);
  const bool gives_zeros = with_activation(p.activation, [](auto act) { return act.gives_zeros; });
  int failed = 0;
#pragma omp parallel num_threads(larger(1, p.n_threads))
  {
    const int64_t t = thread_index(), n = thread_count();
    const int64_t g0 = first_unit(p.G, t, n), g1 = first_unit(p.G, t + 1, n);
    const int64_t n0 = first_column(p.O, t, n), n1 = first_column(p.O, t + 1, n);
    float* pa = scratch_of<float>(kBufferA, row_panel_size<T, kDirectProduct<T>>(p.G));
    float* tail = scratch_of<float>(kBufferB, kKBlock * VL);
    float* c = scratch_of<float>(kBufferC, 2 * kMr * p.G + VL);
    float* acc = scratch_of<float>(kBufferAcc, p.T * round_up(n1 - n0, VL) + 1);
    int32_t* list = gives_zeros ? scratch_of<int32_t>(kBufferIndex, p.G + kListAhead) : nullptr;
    const bool ready = pa && tail && c && acc && (list || !gives_zeros);
    if (!ready) {
#pragma omp atomic write
      failed = 1;
    }
    if (ready && g1 > g0)
      decode_up<T>(p, slots, activate, g0, g1, list, c, h);
#pragma omp barrier
    if (ready && n1 > n0) decode_down<T>(p, slots, n0, n1, h, list, pa, tail, acc, out);
  }
  return failed ? SPARSE_FFN_NO_MEMORY : SPARSE_FFN_OK;
}

int experts_decode(const sparse_ffn_experts& p, void* out) {
  return with_dtype(p.dtype, [&](auto example) { return decode(p, static_cast<decltype(example)*>(out)); });
}

SPARSE_FFN_END
