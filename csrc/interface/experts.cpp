// experts.cpp - the C interface of the expert FFN and of the MoE layer.
#include "call.h"
#include "code_rows.h"

namespace sparse_ffn {
namespace {

// That order and offsets are what a sort of S slots by E experts gives, as far as it is read: up to the void slots.
void check_sorted(Operands& o, const int32_t* order, const int32_t* offsets, int64_t S, int64_t E) {
  if (o.status()) return;
  bool sorted = offsets[0] == 0 && offsets[E] <= S;
  for (int64_t e = 0; e < E && sorted; e++) sorted = offsets[e] <= offsets[e + 1];
  for (int64_t e = 0; e < E && sorted; e++) {
    int32_t before = -1;
    for (int64_t s = offsets[e]; s < offsets[e + 1]; before = order[s++])
      sorted &= order[s] > before && order[s] < S;
  }
  o.require(sorted, "order and offsets must be those that the forward pass has sorted");
}

sparse_ffn_experts take_units(Operands& o, const sparse_ffn_units& u, int32_t activation, int32_t n_threads) {
  sparse_ffn_experts p{};
  p.x = o.take<void>("x", u.x, "TD", Strides::kRows);
  p.x_stride = u.x.stride[0];
  p.keys = o.take<void>("keys", u.keys, "EGD");
  p.values = o.take<void>("values", u.values, "EGO");
  p.gate_keys = o.maybe<void>("gate_keys", u.gate_keys, "EGD");
  p.key_bias = o.maybe<void>("key_bias", u.key_bias, "EG");
  p.T = o['T'], p.D = o['D'], p.E = o['E'], p.G = o['G'], p.O = o['O'];
  o.count("experts", p.E);
  o.count("units of an expert", p.G);
  p.dtype = o.dtype(), p.activation = take_activation(o, activation), p.n_threads = n_threads;
  return p;
}

// What is known once a tensor [T, K] is.
void take_slots(Operands& o, sparse_ffn_experts& p, const sparse_ffn_tensor& dropout_mask) {
  p.dropout_mask = o.maybe<void>("dropout_mask", dropout_mask, "TKG");
  p.K = o['K'];
  o.count("slots", p.T, p.K);
  o.let('S', p.T * p.K);
  o.let('F', p.E + 1);
}

struct Saved {
  int32_t *order, *offsets;
  void *up, *glu_gate;
};
Saved take_saved(Operands& o, const sparse_ffn_saved& s, bool glu) {
  return {o.take<int32_t>("order", s.order, "S"), o.take<int32_t>("offsets", s.offsets, "F"),
          o.take<void>("up", s.up, "SG"), glu ? o.take<void>("glu_gate", s.glu_gate, "SG") : nullptr};
}
// All or nothing; without them the order is in scratch.
Saved take_saved_output(Operands& o, const sparse_ffn_saved& s, bool glu) {
  return s.up.dtype == SPARSE_FFN_ABSENT ? Saved{} : take_saved(o, s, glu);
}
bool find_room(const sparse_ffn_experts& p, Saved& s) {
  if (!s.order) s.order = scratch_of<int32_t>(kBufferOrder, p.T * p.K + 1);
  if (!s.offsets) s.offsets = scratch_of<int32_t>(kBufferOffsets, p.E + 1);
  return s.order && s.offsets;
}

// The slots sorted, then the experts.
int forward(sparse_ffn_experts& p, const int64_t* index, int32_t decode_tokens, const Saved& saved, void* out) {
  p.order = PHASE("sort", sort_by_expert(index, p.T * p.K, p.E, saved.order, saved.offsets));
  p.offsets = saved.offsets;
  if (!p.E) {
    zero(out, p.T * p.O, p.dtype);
    return SPARSE_FFN_OK;
  }
  if (p.T <= decode_tokens && !saved.up) return done(PHASE("decode", kernels().experts_decode(p, out)));
  return done(kernels().experts_forward(p, out, saved.up, saved.glu_gate));
}

sparse_ffn_router take_router(Operands& o, const sparse_ffn_tensor& weight, const sparse_ffn_tensor& bias,
                              const sparse_ffn_tensor& mask, int32_t gate_function) {
  sparse_ffn_router r{};
  r.weight = o.take<void>("router.weight", weight, "RD");
  r.bias = o.maybe<float>("router.bias", bias, "R");
  r.mask = o.maybe<uint8_t>("mask", mask, "T");
  r.rows = o['R'];
  const bool known = gate_function >= 0 && gate_function <= SPARSE_FFN_LAST_GATE;
  o.require(known, "gate function %d is unknown", gate_function);
  if (known) r.gate_function = static_cast<sparse_ffn_gate>(gate_function);
  o.require(o.dtype() != SPARSE_FFN_FP16, "the router takes float32 and bfloat16, got float16");
  return r;
}
// The sums of runs of tokens, or their gradients.
float* take_sums(Operands& o, sparse_ffn_router& r, const char* name, const sparse_ffn_tensor& sums) {
  o.require(o['E'] >= 1 && r.rows >= o['E'], "router.weight must have a row for each of %d experts, got %d rows",
            static_cast<int>(o['E']), static_cast<int>(r.rows));
  o.require(o['K'] >= 1 && o['K'] <= r.rows, "k must be at least 1 and at most the number of the router's rows, %d, got %d",
            static_cast<int>(r.rows), static_cast<int>(o['K']));
  float* found = o.maybe<float>(name, sums, "BR");
  r.groups = found ? o['B'] : 1;
  o.require(r.groups >= 1 && o['T'] % r.groups == 0, "%s must have a row for each of equally long runs of tokens", name);
  return found;
}

}  // namespace
}  // namespace sparse_ffn

using namespace sparse_ffn;

extern "C" {

int sparse_ffn_experts_forward(const sparse_ffn_experts_forward_args* a, int32_t activation, int32_t decode_tokens,
                               int32_t n_threads) {
  Operands o;
  sparse_ffn_experts p = take_units(o, a->units, activation, n_threads);
  const int64_t* index = o.take<int64_t>("index", a->index, "TK");
  p.gate = o.take<float>("gate", a->gate, "TK");
  take_slots(o, p, a->dropout_mask);
  void* out = o.take<void>("out", a->out, "TO");
  Saved saved = take_saved_output(o, a->saved, p.gate_keys);
  o.experts("index", index, o['S'], p.E);
  if (o.status()) return o.status();
  return find_room(p, saved) ? forward(p, index, decode_tokens, saved, out) : done(SPARSE_FFN_NO_MEMORY);
}

int sparse_ffn_experts_backward(const sparse_ffn_experts_backward_args* a, int32_t activation, int32_t n_threads) {
  Operands o;
  sparse_ffn_experts p = take_units(o, a->units, activation, n_threads);
  p.gate = o.take<float>("gate", a->gate, "TK");
  take_slots(o, p, a->dropout_mask);
  const Saved saved = take_saved(o, a->saved, p.gate_keys);
  const void* dout = o.take<void>("dout", a->dout, "TO", Strides::kRows);
  void* dx = o.maybe<void>("dx", a->dx, "TD");
  void* dkeys = o.maybe<void>("dkeys", a->dkeys, "EGD");
  void* dvalues = o.maybe<void>("dvalues", a->dvalues, "EGO");
  void* dgate_keys = o.maybe<void>("dgate_keys", a->dgate_keys, "EGD");
  void* dkey_bias = o.maybe<void>("dkey_bias", a->dkey_bias, "EG");
  float* dgate = o.maybe<float>("dgate", a->dgate, "TK");
  check_sorted(o, saved.order, saved.offsets, o['S'], p.E);
  if (o.status()) return o.status();
  p.order = saved.order, p.offsets = saved.offsets;
  if (!p.E) {
    if (dx) zero(dx, p.T * p.D, p.dtype);
    if (dgate) zero(dgate, p.T * p.K, SPARSE_FFN_FP32);
    return SPARSE_FFN_OK;
  }
  return done(kernels().experts_backward(p, dout, a->dout.stride[0], saved.up, saved.glu_gate, dx, dkeys, dgate_keys,
                                         dvalues, dkey_bias, dgate));
}

int sparse_ffn_moe_forward(const sparse_ffn_moe_forward_args* a, int32_t gate_function, int32_t activation,
                           int32_t decode_tokens, int32_t n_threads) {
  Operands o;
  sparse_ffn_experts p = take_units(o, a->units, activation, n_threads);
  sparse_ffn_router router = take_router(o, a->router_weight, a->router_bias, a->mask, gate_function);
  int64_t* index = o.take<int64_t>("index", a->index, "TK");
  float* gate = o.maybe<float>("gate", a->gate, "TK");
  take_slots(o, p, a->dropout_mask);
  float* sums = take_sums(o, router, "softmax_sums", a->softmax_sums);
  void* out = o.take<void>("out", a->out, "TO");
  Saved saved = take_saved_output(o, a->saved, p.gate_keys);
  if (o.status()) return o.status();
  if (!gate) gate = scratch_of<float>(kBufferDgate, p.T * p.K + 1);
  if (!gate || !find_room(p, saved)) return done(SPARSE_FFN_NO_MEMORY);
  p.gate = gate;
  if (const int bad = PHASE("route", kernels().route_tokens(p, router, index, gate, sums))) return done(bad);
  return forward(p, index, decode_tokens, saved, out);
}

int sparse_ffn_quantized_moe(const sparse_ffn_quantized_moe_args* a, int32_t gate_function, int32_t activation,
                             int32_t n_threads) {
  Operands o;
  sparse_ffn_quantized_experts q{};
  sparse_ffn_experts& p = q.experts;
  p.x = o.take<void>("x", a->x, "TD", Strides::kRows);
  p.x_stride = a->x.stride[0];
  q.keys = take_codes(o, a->keys, {"EGA", "EGP", {"keys.qdata", "keys.scale", "keys.zero_point"}});
  q.values = take_codes(o, a->values, {"EGV", "EGU", {"values.qdata", "values.scale", "values.zero_point"}});
  const bool glu = a->gate_keys.qdata.dtype != SPARSE_FFN_ABSENT;
  if (glu)
    q.gate_keys = take_codes(o, a->gate_keys, {"EGW", "EGH", {"gate_keys.qdata", "gate_keys.scale", "gate_keys.zero_point"}});
  p.key_bias = o.maybe<void>("key_bias", a->key_bias, "EG");
  p.T = o['T'], p.D = o['D'], p.E = o['E'], p.G = o['G'], p.O = q.values.columns;
  const int columns = static_cast<int>(p.D);
  o.require(q.keys.columns == p.D, "keys.qdata must have codes of %d columns, as many as x has", columns);
  o.require(!glu || q.gate_keys.columns == p.D, "gate_keys.qdata must have codes of %d columns, as many as x has", columns);
  o.let('O', p.O);
  o.count("units of an expert", p.G);
  p.dtype = o.dtype(), p.activation = take_activation(o, activation), p.n_threads = n_threads;
  sparse_ffn_router router = take_router(o, a->router_weight, a->router_bias, {}, gate_function);
  int64_t* index = o.take<int64_t>("index", a->index, "TK");
  take_slots(o, p, {});
  take_sums(o, router, "softmax_sums", {});
  void* out = o.take<void>("out", a->out, "TO");
  if (o.status()) return o.status();
  Saved sorted{};
  float* gate = scratch_of<float>(kBufferDgate, p.T * p.K + 1);
  if (!gate || !find_room(p, sorted)) return done(SPARSE_FFN_NO_MEMORY);
  p.gate = gate;
  if (const int bad = kernels().route_tokens(p, router, index, gate, nullptr)) return done(bad);
  p.order = sort_by_expert(index, p.T * p.K, p.E, sorted.order, sorted.offsets);
  p.offsets = sorted.offsets;
  return done(kernels().quantized_experts(q, out));
}

int sparse_ffn_moe_backward(const sparse_ffn_moe_backward_args* a, int32_t gate_function, int32_t activation,
                            int32_t n_threads) {
  Operands o;
  sparse_ffn_experts p = take_units(o, a->units, activation, n_threads);
  sparse_ffn_router router = take_router(o, a->router_weight, {}, a->mask, gate_function);
  const int64_t* index = o.take<int64_t>("index", a->index, "TK");
  p.gate = o.take<float>("gate", a->gate, "TK");
  take_slots(o, p, a->dropout_mask);
  const Saved saved = take_saved(o, a->saved, p.gate_keys);
  const void* dout = o.take<void>("dout", a->dout, "TO", Strides::kRows);
  const float* dgate = o.maybe<float>("dgate", a->dgate, "TK");
  const float* dsums = take_sums(o, router, "dsoftmax_sums", a->dsoftmax_sums);
  void* dx = o.maybe<void>("dx", a->dx, "TD");
  void* drouter = o.maybe<void>("drouter_weight", a->drouter_weight, "RD");
  void* dkeys = o.maybe<void>("dkeys", a->dkeys, "EGD");
  void* dvalues = o.maybe<void>("dvalues", a->dvalues, "EGO");
  void* dgate_keys = o.maybe<void>("dgate_keys", a->dgate_keys, "EGD");
  void* dkey_bias = o.maybe<void>("dkey_bias", a->dkey_bias, "EG");
  o.below("index", index, o['S'], router.rows);
  check_sorted(o, saved.order, saved.offsets, o['S'], p.E);
  if (o.status()) return o.status();
  p.order = saved.order, p.offsets = saved.offsets;
  return done(kernels().moe_backward(p, router, dout, a->dout.stride[0], saved.up, saved.glu_gate, index, dgate, dsums,
                                     dx, drouter, dkeys, dgate_keys, dvalues, dkey_bias));
}

}  // extern "C"
