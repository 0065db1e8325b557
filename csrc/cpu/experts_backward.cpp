// experts_backward.cpp - all gradients of the expert FFN in four passes over the arithmetic of the forward:
//   dh = dout @ values^T by rows (gate's gradient and activation's derivative in the epilogue), dx = d_up @ keys by output
//   columns, and the two weight gradients straight into their places.
#include "experts.h"
#include "gemm_outer.h"
#include "gemm_scatter.h"
#include "hidden.h"
#include "phases.h"
#include "router.h"

SPARSE_FFN_BEGIN

template <class T> struct Gradients {
  T *dx, *dkeys, *dgate_keys, *dvalues, *dkey_bias;
  float* dgate;
};

// Sum of d_up over each expert's rows.
template <class T>
static bool bias_gradient(const sparse_ffn_experts& p, const T* d_up, int64_t d_up_stride, T* dkey_bias) {
  int failed = 0;
#pragma omp parallel num_threads(larger(1, p.n_threads))
  {
    float* total = scratch_of<float>(kBufferC, round_up(p.G, VL));
    if (!total) {
#pragma omp atomic write
      failed = 1;
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t e = 0; e < p.E; e++) {
      if (!total) continue;
      memset(total, 0, static_cast<size_t>(round_up(p.G, VL)) * 4);
      for (int64_t s = p.offsets[e]; s < p.offsets[e + 1]; s++)
        for (int64_t i = 0; i < p.G; i += VL)
          store(total + i, load(total + i) + load_upto(d_up + s * d_up_stride + i, p.G - i));
      for (int64_t i = 0; i < p.G; i += VL) store_upto(dkey_bias + e * p.G + i, load(total + i), p.G - i);
    }
  }
  return !failed;
}

template <class T>
static int backward(const sparse_ffn_experts& p, const T* dout, int64_t dout_stride, const T* saved_up,
                    const T* saved_glu_gate, const Gradients<T>& grad, const RouterGradient* router) {
  const int64_t S = p.T * p.K;
  const bool glu = p.gate_keys != nullptr, recompute = !saved_is_hidden(p) && grad.dvalues;
  const bool want_d_up = grad.dx || grad.dkeys || grad.dgate_keys || grad.dkey_bias;
  const int64_t d_up_stride = glu ? 2 * p.G : p.G;
  SlotTables slots;
  if (!fill_slot_tables(p, &slots)) return SPARSE_FFN_NO_MEMORY;
  T* hidden = recompute ? scratch_of<T>(kBufferHidden, S * p.G) : nullptr;
  T* d_up = want_d_up ? scratch_of<T>(kBufferDUp, S * d_up_stride) : nullptr;
  if ((recompute && !hidden) || (want_d_up && !d_up)) return SPARSE_FFN_NO_MEMORY;

  if (grad.dgate && p.offsets[p.E] < S) memset(grad.dgate, 0, static_cast<size_t>(S) * 4);  // void slots have none
  if (want_d_up || grad.dgate || recompute) {
    RowGemm<T> dh{};
    dh.a = dout;
    dh.a_stride = dout_stride;
    dh.gather = slots.token;
    dh.K = p.O;
    dh.w[0] = static_cast<const T*>(p.values);
    dh.w_stride_expert = p.G * p.O;
    dh.w_stride_row = p.O;
    dh.N = p.G;
    dh.offsets = p.offsets;
    dh.E = p.E;
    dh.n_threads = p.n_threads;
    const HiddenBackwardFn<T> differentiate = hidden_backward_for<T>(p.activation, glu);
    const T* dropout_mask = static_cast<const T*>(p.dropout_mask);
    const bool done = PHASE("dh", run_row_gemm(dh, [&](const FinishedRow& r) {
      const int64_t first = r.s * p.G + r.n0, slot = p.order[r.s];
      HiddenBackward<T> b{};
      b.c_dh = r.c[0];
      b.up = saved_up + first;
      b.glu_gate = glu ? saved_glu_gate + first : nullptr;
      b.dropout_mask = dropout_mask ? dropout_mask + slot * p.G + r.n0 : nullptr;
      b.gate = slots.gate[r.s];
      b.d_up = d_up ? d_up + r.s * d_up_stride + r.n0 : nullptr;
      b.d_glu_gate = d_up ? b.d_up + p.G : nullptr;
      b.h = hidden ? hidden + first : nullptr;
      b.n = r.n;
      const float dgate = differentiate(b);
      if (grad.dgate) grad.dgate[slot] = dgate + (r.n0 ? grad.dgate[slot] : 0.f);
    }));
    if (!done) return SPARSE_FFN_NO_MEMORY;
  }
  const T* dscore = nullptr;
  if (router) {
    dscore = PHASE("dscores", score_gradient<T>(p, *router, grad.dgate));
    if (!dscore) return SPARSE_FFN_NO_MEMORY;
  }
  if (grad.dx) {
    ScatterGemm<T> dx{};
    dx.a = d_up;
    dx.a_stride = d_up_stride;
    dx.K = p.G;
    dx.w[0] = static_cast<const T*>(p.keys);
    dx.w[1] = static_cast<const T*>(p.gate_keys);
    dx.w_stride_expert = p.G * p.D;
    dx.w_stride_k = p.D;
    dx.w_stride_n = 1;
    dx.N = p.D;
    dx.offsets = p.offsets;
    dx.E = p.E;
    dx.scatter = slots.token;
    dx.out = grad.dx;
    dx.out_stride = p.D;
    dx.rows_out = p.T;
    if (router) {
      dx.extra_a = dscore;
      dx.extra_w = static_cast<const T*>(router->router->weight);
      dx.extra_K = router->router->rows;
    }
    dx.n_threads = p.n_threads;
    if (!PHASE("dx", run_scatter_gemm(dx))) return SPARSE_FFN_NO_MEMORY;
  }
  OuterGemm<T> dw{};
  dw.M = p.G;
  dw.gather_b = slots.token;
  dw.offsets = p.offsets;
  dw.E = p.E;
  dw.n_threads = p.n_threads;
  if (grad.dkeys || grad.dgate_keys) {
    dw.a = d_up;
    dw.a_stride = d_up_stride;
    dw.b = static_cast<const T*>(p.x);
    dw.b_stride = p.x_stride;
    dw.N = p.D;
    dw.out[0] = grad.dkeys;
    dw.out[1] = glu ? grad.dgate_keys : nullptr;
    if (!PHASE("dkeys", run_outer_gemm(dw))) return SPARSE_FFN_NO_MEMORY;
  }
  if (grad.dvalues) {
    dw.a = recompute ? hidden : saved_up;
    dw.a_stride = p.G;
    dw.b = dout;
    dw.b_stride = dout_stride;
    dw.N = p.O;
    dw.scale = slots.gate;
    dw.out[0] = grad.dvalues;
    dw.out[1] = nullptr;
    if (!PHASE("dvalues", run_outer_gemm(dw))) return SPARSE_FFN_NO_MEMORY;
  }
  if (router && router->dweight) {
    const int32_t all[2] = {0, static_cast<int32_t>(p.T)};
    OuterGemm<T> dr{};
    dr.a = dscore;
    dr.a_stride = dr.M = router->router->rows;
    dr.b = static_cast<const T*>(p.x);
    dr.b_stride = p.x_stride;
    dr.N = p.D;
    dr.offsets = all;
    dr.E = 1;
    dr.out[0] = static_cast<T*>(router->dweight);
    dr.n_threads = p.n_threads;
    if (!PHASE("drouter", run_outer_gemm(dr))) return SPARSE_FFN_NO_MEMORY;
  }
  if (grad.dkey_bias && !bias_gradient(p, d_up, d_up_stride, grad.dkey_bias)) return SPARSE_FFN_NO_MEMORY;
  return SPARSE_FFN_OK;
}

int experts_backward(const sparse_ffn_experts& p, const void* dout, int64_t dout_stride, const void* saved_up,
                     const void* saved_glu_gate, void* dx, void* dkeys, void* dgate_keys, void* dvalues, void* dkey_bias,
                     float* dgate) {
  const auto run = [&](auto example) {
    using T = decltype(example);
    const Gradients<T> grad{static_cast<T*>(dx),      static_cast<T*>(dkeys),     static_cast<T*>(dgate_keys),
                            static_cast<T*>(dvalues), static_cast<T*>(dkey_bias), dgate};
    return backward<T>(p, static_cast<const T*>(dout), dout_stride, static_cast<const T*>(saved_up),
                       static_cast<const T*>(saved_glu_gate), grad, nullptr);
  };
  return with_packed_dtype(p.dtype, run);
}

int moe_backward(const sparse_ffn_experts& p, const sparse_ffn_router& r, const void* dout, int64_t dout_stride,
                 const void* saved_up, const void* saved_glu_gate, const int64_t* index, const float* dgate,
                 const float* dsums, void* dx, void* drouter, void* dkeys, void* dgate_keys, void* dvalues,
                 void* dkey_bias) {
  float* experts_dgate = scratch_of<float>(kBufferDgate, p.T * p.K + 1);
  if (!experts_dgate) return SPARSE_FFN_NO_MEMORY;
  const RouterGradient router{&r, index, dgate, dsums, drouter};
  const auto run = [&](auto example) {
    using T = decltype(example);
    const Gradients<T> grad{static_cast<T*>(dx),      static_cast<T*>(dkeys),     static_cast<T*>(dgate_keys),
                            static_cast<T*>(dvalues), static_cast<T*>(dkey_bias), experts_dgate};
    return backward<T>(p, static_cast<const T*>(dout), dout_stride, static_cast<const T*>(saved_up),
                       static_cast<const T*>(saved_glu_gate), grad, &router);
  };
  return p.dtype == SPARSE_FFN_FP32 ? run(float{}) : run(bf16{});
}

SPARSE_FFN_END
