// slots.h - the slots of a CVMM: their indices taken, checked and sorted by expert. Not compiled per instruction set.
#pragma once
#include "call.h"

namespace sparse_ffn {

struct Slots {
  const int64_t *expert, *gather, *scatter;
  const float* scale;
};
// Once x [N, M] is taken.
inline Slots take_slots(Operands& o, const sparse_ffn_slots& s) {
  const Slots slots = {o.take<int64_t>("expert_index", s.expert_index, "S"),
                       o.maybe<int64_t>("gather_index", s.gather_index, "S"),
                       o.maybe<int64_t>("scatter_index", s.scatter_index, "S"),
                       o.maybe<float>("reduction_weight", s.reduction_weight, "S")};
  if (!slots.scatter) o.let('R', o['S']);
  if (!slots.gather) o.require(o['S'] == o['N'], "expert_index must name an expert for each row of x without gather_index");
  return slots;
}

// What is known once a tensor [R, L] is.
inline void check_slots(Operands& o, sparse_ffn_cvmm& p, const Slots& slots) {
  o.count("slots", o['S']);
  o.count("rows of x", o['N']);
  o.count("rows of out", o['R']);
  o.experts("expert_index", slots.expert, o['S'], o['E']);
  if (slots.gather) o.below("gather_index", slots.gather, o['S'], o['N']);
  if (slots.scatter) o.below("scatter_index", slots.scatter, o['S'], o['R']);
  p.rows_x = o['N'], p.rows_out = o['R'], p.S = o['S'], p.E = o['E'], p.M = o['M'], p.L = o['L'];
}

// Sorts the slots into scratch and returns the slot at each sorted position; null when out of memory.
inline const int32_t* sort_slots(sparse_ffn_cvmm& p, const Slots& s) {
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

}  // namespace sparse_ffn
