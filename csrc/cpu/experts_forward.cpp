// experts_forward.cpp - the expert FFN: up-projection by rows, activation, down-projection by output columns.
#include "experts.h"
#include "gemm_scatter.h"
#include "hidden.h"
#include "phases.h"

SPARSE_FFN_BEGIN

template <class T> static int forward(const sparse_ffn_experts& p, T* out, T* saved_up, T* saved_glu_gate) {
  const int64_t S = p.T * p.K;
  const bool glu = p.gate_keys != nullptr, shared = saved_is_hidden(p) && saved_up;
  SlotTables slots;
  if (!fill_slot_tables(p, &slots)) return SPARSE_FFN_NO_MEMORY;
  T* hidden = shared ? saved_up : scratch_of<T>(kBufferHidden, S * p.G);
  if (!hidden) return SPARSE_FFN_NO_MEMORY;

  RowGemm<T> up{};
  up.a = static_cast<const T*>(p.x);
  up.a_stride = p.x_stride;
  up.gather = slots.token;
  up.K = p.D;
  up.w[0] = static_cast<const T*>(p.keys);
  up.w[1] = static_cast<const T*>(p.gate_keys);
  up.w_stride_expert = p.G * p.D;
  up.w_stride_row = p.D;
  up.N = p.G;
  up.offsets = p.offsets;
  up.E = p.E;
  up.n_threads = p.n_threads;
  const HiddenForwardFn<T> activate = hidden_forward_for<T>(p.activation, glu);
  const T* bias = static_cast<const T*>(p.key_bias);
  const T* dropout_mask = static_cast<const T*>(p.dropout_mask);
  const bool done = PHASE("up", run_row_gemm(up, [&](const FinishedRow& r) {
    const int64_t first = r.s * p.G + r.n0;  // of these units
    HiddenForward<T> f{};
    f.c_up = r.c[0];
    f.c_glu_gate = r.c[1];
    f.bias = bias ? bias + r.e * p.G + r.n0 : nullptr;
    f.dropout_mask = dropout_mask ? dropout_mask + p.order[r.s] * p.G + r.n0 : nullptr;
    f.saved_up = saved_up ? saved_up + first : nullptr;
    f.saved_glu_gate = saved_glu_gate ? saved_glu_gate + first : nullptr;
    f.h = hidden + first;
    f.n = r.n;
    activate(f);
  }));
  if (!done) return SPARSE_FFN_NO_MEMORY;

  ScatterGemm<T> down{};
  down.a = hidden;
  down.a_stride = p.G;
  down.K = p.G;
  down.w[0] = static_cast<const T*>(p.values);
  down.w_stride_expert = p.G * p.O;
  down.w_stride_k = p.O;
  down.w_stride_n = 1;
  down.N = p.O;
  down.offsets = p.offsets;
  down.E = p.E;
  down.scatter = slots.token;
  down.scale = slots.gate;
  down.out = out;
  down.out_stride = p.O;
  down.rows_out = p.T;
  down.n_threads = p.n_threads;
  return PHASE("down", run_scatter_gemm(down)) ? SPARSE_FFN_OK : SPARSE_FFN_NO_MEMORY;
}

int experts_forward(const sparse_ffn_experts& p, void* out, void* saved_up, void* saved_glu_gate) {
  return with_packed_dtype(p.dtype, [&](auto example) {
    using T = decltype(example);
    return forward(p, static_cast<T*>(out), static_cast<T*>(saved_up), static_cast<T*>(saved_glu_gate));
  });
}

SPARSE_FFN_END
