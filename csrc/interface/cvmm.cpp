// cvmm.cpp - the C interface of CVMM.
#include "slots.h"

namespace sparse_ffn {
namespace {

Slots take_cvmm(Operands& o, sparse_ffn_cvmm& p, const sparse_ffn_tensor& x, const sparse_ffn_tensor& weight,
                const sparse_ffn_slots& s, int32_t n_threads) {
  p.x = o.take<void>("x", x, "NM", Strides::kRows);
  p.x_stride = x.stride[0];
  p.w = o.take<void>("weight", weight, "EML", Strides::kAny);
  p.w_stride_e = weight.stride[0];
  p.w_stride_m = o['M'] > 1 ? weight.stride[1] : 1;
  p.w_stride_l = o['L'] > 1 ? weight.stride[2] : 1;
  o.count("experts", o['E']);
  o.require(p.w_stride_m == 1 || p.w_stride_l == 1, "weight must have unit stride in one of its last two dimensions");
  const Slots slots = take_slots(o, s);
  p.dtype = o.dtype(), p.n_threads = n_threads;
  return slots;
}

// The same product with the roles of x and dout exchanged: its gradient of the weights is transposed.
sparse_ffn_cvmm mirrored(const sparse_ffn_cvmm& p, const void* dout, int64_t dout_stride) {
  sparse_ffn_cvmm m = p;
  m.rows_x = p.rows_out, m.rows_out = p.rows_x, m.M = p.L, m.L = p.M;
  m.x = dout, m.x_stride = dout_stride;
  m.gather = p.scatter, m.scatter = p.gather;
  return m;
}

}  // namespace
}  // namespace sparse_ffn

using namespace sparse_ffn;

extern "C" {

int sparse_ffn_cvmm_forward(const sparse_ffn_cvmm_forward_args* a, int32_t n_threads) {
  Operands o;
  sparse_ffn_cvmm p{};
  const Slots slots = take_cvmm(o, p, a->x, a->weight, a->slots, n_threads);
  void* out = o.take<void>("out", a->out, "RL");
  check_slots(o, p, slots);
  if (o.status()) return o.status();
  if (!p.E) {
    zero(out, p.rows_out * p.L, p.dtype);
    return SPARSE_FFN_OK;
  }
  return sort_slots(p, slots) ? done(kernels().cvmm_forward(p, out)) : done(SPARSE_FFN_NO_MEMORY);
}

int sparse_ffn_cvmm_backward(const sparse_ffn_cvmm_backward_args* a, int32_t n_threads) {
  Operands o;
  sparse_ffn_cvmm p{};
  const Slots slots = take_cvmm(o, p, a->x, a->weight, a->slots, n_threads);
  const void* dout = o.take<void>("dout", a->dout, "RL", Strides::kRows);
  check_slots(o, p, slots);
  void* dx = o.maybe<void>("dx", a->dx, "NM");
  float* dscale = o.maybe<float>("dreduction_weight", a->dreduction_weight, "S");
  const sparse_ffn_tensor& dw = a->dweight;
  void* dweight = dw.dtype ? o.take<void>("dweight", dw, "EML", Strides::kPermuted) : nullptr;
  o.require(!dweight || p.E < 2 || !(p.M && p.L) || dw.stride[0] == p.M * p.L,
            "dweight must hold one matrix after the other");
  if (o.status()) return o.status();
  if (!p.E) {
    if (dx) zero(dx, p.rows_x * p.M, p.dtype);
    if (dscale) zero(dscale, p.S, SPARSE_FFN_FP32);
    return SPARSE_FFN_OK;
  }
  const int32_t* order = sort_slots(p, slots);
  float* sorted_dscale = dscale ? scratch_of<float>(kBufferDgate, p.S + 1) : nullptr;
  if (!order || (dscale && !sorted_dscale)) return done(SPARSE_FFN_NO_MEMORY);
  const int64_t dout_stride = a->dout.stride[0];
  const bool transposed = dweight && p.M > 1 && p.L > 1 && dw.stride[1] == 1;
  int status = kernels().cvmm_backward(p, dout, dout_stride, dx, transposed ? nullptr : dweight, sorted_dscale);
  if (!status && transposed)
    status = kernels().cvmm_backward(mirrored(p, dout, dout_stride), p.x, p.x_stride, nullptr, dweight, nullptr);
  for (int64_t s = 0; dscale && s < p.S; s++) dscale[order[s]] = s < p.offsets[p.E] ? sorted_dscale[s] : 0.f;
  return done(status);
}

}  // extern "C"
