// hidden.h - what happens to one row of hidden units between the two matrix products, forward and backward.
// c_up (and with a GLU c_glu_gate) are the row's fp32 products with keys (and gate_keys).
#pragma once
#include "problem.h"
#include "vec_math.h"

SPARSE_FFN_BEGIN

template <class T> struct HiddenForward {
  const float *c_up, *c_glu_gate;
  const T *bias, *dropout_mask;  // null: none
  T *saved_up, *saved_glu_gate;  // null: not kept
  T* h;                          // saved_up itself where the backward pass needs the activation and nothing else
  int64_t n;
};
template <class T> using HiddenForwardFn = void (*)(const HiddenForward<T>&);

template <class T, class Act, bool kGlu> static void hidden_forward(const HiddenForward<T>& f) {
  for (int64_t i = 0; i < f.n; i += VL) {
    const int64_t left = f.n - i;
    V up = load_upto(f.c_up + i, left);
    if (f.bias) up = up + load_upto(f.bias + i, left);
    V h;
    if constexpr (kGlu) {
      const V glu_gate = load_upto(f.c_glu_gate + i, left);
      h = Act::value(glu_gate) * up;
      if (f.saved_up) store_upto(f.saved_up + i, up, left);
      if (f.saved_glu_gate) store_upto(f.saved_glu_gate + i, glu_gate, left);
    } else {
      h = Act::value(up);
      if (f.saved_up) store_upto(f.saved_up + i, Act::saves_value ? h : up, left);
    }
    if (f.dropout_mask) h = h * load_upto(f.dropout_mask + i, left);
    if (f.h != f.saved_up) store_upto(f.h + i, h, left);
  }
}

template <class T> struct HiddenBackward {
  const float* c_dh;      // dout of the token times the values: the gradient of gate * h, by gate
  const T *up, *glu_gate, *dropout_mask;
  float gate;
  T *d_up, *d_glu_gate;   // null when neither dx nor dkeys is wanted
  T* h;                   // null: the saved up is h already
  int64_t n;
};
// Returns the gate's gradient: c_dh . h.
template <class T> using HiddenBackwardFn = float (*)(const HiddenBackward<T>&);

template <class T, class Act, bool kGlu> static float hidden_backward(const HiddenBackward<T>& b) {
  V dgate = zero();
  for (int64_t i = 0; i < b.n; i += VL) {
    const int64_t left = b.n - i;
    const V dh = load_upto(b.c_dh + i, left), up = load_upto(b.up + i, left);
    const V dropout = b.dropout_mask ? load_upto(b.dropout_mask + i, left) : splat(1.f);
    const V upstream = dh * dropout * b.gate;
    V a, d_glu_gate, h, d_up;
    if constexpr (kGlu) {
      Act::both(load_upto(b.glu_gate + i, left), upstream * up, a, d_glu_gate);
      h = a * up * dropout;
      d_up = upstream * a;
      if (b.d_up) store_upto(b.d_glu_gate + i, d_glu_gate, left);
    } else {
      Act::both(up, upstream, a, d_up);
      h = a * dropout;
    }
    // Lanes past the row are zero in dh, so they add nothing; h there is finite for every activation.
    dgate = fma(dh, h, dgate);
    if (b.d_up) store_upto(b.d_up + i, d_up, left);
    if (b.h) store_upto(b.h + i, h, left);
  }
  return sum(dgate);
}

template <class T> static HiddenForwardFn<T> hidden_forward_for(sparse_ffn_activation activation, bool glu) {
  return with_activation(activation, [&](auto act) -> HiddenForwardFn<T> {
    return glu ? hidden_forward<T, decltype(act), true> : hidden_forward<T, decltype(act), false>;
  });
}
template <class T> static HiddenBackwardFn<T> hidden_backward_for(sparse_ffn_activation activation, bool glu) {
  return with_activation(activation, [&](auto act) -> HiddenBackwardFn<T> {
    return glu ? hidden_backward<T, decltype(act), true> : hidden_backward<T, decltype(act), false>;
  });
}

// True where the saved up is the hidden row itself, so that no second buffer is needed.
static inline bool saved_is_hidden(const sparse_ffn_experts& p) {
  return with_activation(p.activation, [](auto act) { return act.saves_value; }) && !p.gate_keys && !p.dropout_mask;
}

SPARSE_FFN_END
