// quantized_experts.cpp - the expert FFN with rows of codes, without gradients: products up, activation, and a product down.
#include "experts.h"
#include "threads.h"
#include "vec_math.h"

SPARSE_FFN_BEGIN

constexpr int64_t kHiddenPiece = int64_t{1} << 14;  // hidden units that a thread is worth waking for

// h = act(up + bias), or in a GLU act(glu_gate) * (up + bias), of the slots from `first` to `last`; h may be up.
template <class T, class Act>
static void activate(const sparse_ffn_experts& p, int64_t first, int64_t last, const T* up, const T* glu_gate, T* h) {
  const T* bias = static_cast<const T*>(p.key_bias);
  int64_t e = 0;
  for (int64_t s = first; s < last; s++) {
    while (p.offsets[e + 1] <= s) e++;
    for (int64_t i = 0; i < p.G; i += VL) {
      const int64_t left = p.G - i, at = s * p.G + i;
      V z = load_upto(up + at, left);
      if (bias) z = z + load_upto(bias + e * p.G + i, left);
      store_upto(h + at, glu_gate ? Act::value(load_upto(glu_gate + at, left)) * z : Act::value(z), left);
    }
  }
}

template <class T> static int forward(const sparse_ffn_quantized_experts& q, T* out) {
  const sparse_ffn_experts& p = q.experts;
  const int64_t S = p.offsets[p.E];  // void slots have no rows
  SlotTables slots;
  int32_t* each = scratch_of<int32_t>(kBufferAux, S + 1);
  T* h = scratch_of<T>(kBufferDUp, S * p.G + 1);
  T* glu_gate = q.gate_keys.qdata ? scratch_of<T>(kBufferDlogits, S * p.G + 1) : nullptr;
  if (!fill_slot_tables(p, &slots) || !each || !h || (q.gate_keys.qdata && !glu_gate)) return SPARSE_FFN_NO_MEMORY;
  for (int64_t s = 0; s < S; s++) each[s] = static_cast<int32_t>(s);

  sparse_ffn_quantized product{};
  sparse_ffn_cvmm& c = product.cvmm;
  c.E = p.E, c.S = S, c.offsets = p.offsets, c.dtype = p.dtype, c.n_threads = p.n_threads;
  c.x = p.x, c.x_stride = p.x_stride, c.rows_x = p.T, c.M = p.D, c.gather = slots.token;
  c.rows_out = S, c.L = p.G, c.scatter = each;
  product.codes = q.keys;
  if (const int bad = quantized_cvmm(product, h)) return bad;
  product.codes = q.gate_keys;
  if (const int bad = glu_gate ? quantized_cvmm(product, glu_gate) : SPARSE_FFN_OK) return bad;
  with_activation(p.activation, [&](auto act) {
#pragma omp parallel num_threads(team(S * p.G / kHiddenPiece, p.n_threads))
    {
      const int64_t t = thread_index(), n = thread_count();
      activate<T, decltype(act)>(p, S * t / n, S * (t + 1) / n, h, glu_gate, h);
    }
    return 0;
  });
  c.x = h, c.x_stride = p.G, c.rows_x = S, c.M = p.G, c.gather = each;
  c.rows_out = p.T, c.L = p.O, c.scatter = slots.token, c.scale = slots.gate;
  product.codes = q.values, product.down = true;
  return quantized_cvmm(product, out);
}

int quantized_experts(const sparse_ffn_quantized_experts& q, void* out) {
  return with_dtype(q.experts.dtype, [&](auto example) { return forward(q, static_cast<decltype(example)*>(out)); });
}

SPARSE_FFN_END
