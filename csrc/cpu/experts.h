// experts.h - entry points of one instruction set for the expert FFN, and the per-slot tables they share.
#pragma once
#include "problem.h"
#include "types.h"

SPARSE_FFN_BEGIN

int experts_forward(const sparse_ffn_experts&, void* out, void* saved_z, void* saved_zg);
int experts_decode(const sparse_ffn_experts&, void* out);
int experts_backward(const sparse_ffn_experts&, const void* dout, int64_t dout_stride, const void* saved_z,
                     const void* saved_zg, void* dx, void* dkeys, void* dgate_keys, void* dvalues, void* dkey_bias,
                     float* dgate);

int moe_backward(const sparse_ffn_experts&, const sparse_ffn_router&, const void* dout, int64_t dout_stride,
                 const void* saved_z, const void* saved_zg, const int64_t* index, const float* dgate,
                 const float* dsums, void* dx, void* drouter, void* dkeys, void* dgate_keys, void* dvalues,
                 void* dkey_bias);

// Token and gate of each sorted position but those of void slots, in the calling thread's scratch.
struct SlotTables {
  int32_t* token;
  float* gate;
};
static inline bool fill_slot_tables(const sparse_ffn_experts& p, SlotTables* tables) {
  const int64_t S = p.T * p.K;
  tables->token = scratch_of<int32_t>(kSlotToken, S + 1);
  tables->gate = scratch_of<float>(kSlotGate, S + 1);
  if (!tables->token || !tables->gate) return false;
  const uint32_t K = static_cast<uint32_t>(p.K);
  for (int64_t s = 0; s < p.offsets[p.E]; s++) {
    tables->token[s] = static_cast<int32_t>(static_cast<uint32_t>(p.order[s]) / K);
    tables->gate[s] = p.gate[p.order[s]];
  }
  return true;
}

SPARSE_FFN_END
