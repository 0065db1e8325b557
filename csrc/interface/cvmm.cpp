// cvmm.cpp - the C interface of CVMM: sorts the slots.
#include "call.h"

namespace sparse_ffn {
namespace {

struct Slots {
  const int64_t *expert, *gather, *scatter;
  const float* scale;
};
Slots take_cvmm(Operands& o, sparse_ffn_cvmm& p, const sparse_ffn_tensor& x, const sparse_ffn_tensor& weight,
                const sparse_ffn_slots& s, int32_t n_threads) {
  p.x = o.take<void>("x", x, "NM", Strides::kRows);
  p.x_stride = x.stride[0];
  p.w = o.take<void>("weight", weight, "EML", Strides::kAny);
  p.w_stride_e = weight.stride[0];
  p.w_stride_m = o['M'] > 1 ? weight.stride[1] : 1;
  p.w_stride_l = o['L'] > 1 ? weight.stride[2] : 1;
  o.require(p.w_stride_m == 1 || p.w_stride_l == 1, "weight must have unit stride in one of its last two dimensions");
  const Slots slots = {o.take<int64_t>("expert_index", s.expert_index, "S"),
                       o.maybe<int64_t>("gather_index", s.gather_index, "S"),
                       o.maybe<int64_t>("scatter_index", s.scatter_index, "S"),
                       o.maybe<float>("reduction_weight", s.reduction_weight, "S")};
  if (!slots.scatter) o.let('R', o['S']);
  if (!slots.gather) o.require(o['S'] == o['N'], "expert_index must name an expert for each row of x without gather_index");
  p.dtype = o.dtype(), p.n_threads = n_threads;
  return slots;
}

// What is known once a tensor [R, L] is.
void check_slots(Operands& o, sparse_ffn_cvmm& p, const Slots& slots) {
  o.count("slots", o['S']);
  o.count("rows of x", o['N']);
  o.count("rows of out", o['R']);
  o.experts("expert_index", slots.expert, o['S'], o['E']);
  if (slots.gather) o.below("gather_index", slots.gather, o['S'], o['N']);
  if (slots.scatter) o.below("scatter_index", slots.scatter, o['S'], o['R']);
  p.rows_x = o['N'], p.rows_out = o['R'], p.S = o['S'], p.E = o['E'], p.M = o['M'], p.L = o['L'];
}

// Sorts the slots into scratch and returns the slot at each sorted position; null when out of memory.
const int32_t* sort_slots(sparse_ffn_cvmm& p, const Slots& s) {
  int32_t* offsets = scratch_of<int32_t>(kBufferOffsets, p.E + 1);
  int32_t* order = scratch_of<int32_t>(kBufferOrder, p.S + 1);
  int32_t* gather = s.gather ? scratch_of<int32_t>(kBufferToken, p.S + 1) : order;
  int32_t* scatter = s.scatter ? scratch_of<int32_t>(kBufferAux, p.S + 1) : order;
  float* scale = s.scale ? scratch_of<float>(kBufferGate, p.S + 1) : nullptr;
  if (!offsets || !order || !gather || !scatter || (s.scale && !scale)) return nullptr;
  sort_by_expert(s.expert, p.S, p.E, order, offsets);
  for (int64_t i = 0; i < p.S; i++) {  // void slots too: some of it is scattered to
    if (s.gather) gather[i] = static_cast<int32_t>(s.gather[order[i]]);
    if (s.scatter) scatter[i] = static_cast<int32_t>(s.scatter[order[i]]);
    if (s.scale) scale[i] = s.scale[order[i]];
  }
  p.offsets = offsets, p.gather = gather, p.scatter = scatter, p.scale = scale;
  return order;
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
