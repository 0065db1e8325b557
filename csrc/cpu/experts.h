// experts.h - the tables of slots that the passes of the expert FFN share.
#pragma once
#include "ops.h"

SPARSE_FFN_BEGIN

// Token and gate of each sorted position but those of void slots, in the calling thread's scratch.
struct SlotTables {
  int32_t* token;
  float* gate;
};
static inline bool fill_slot_tables(const sparse_ffn_experts& p, SlotTables* tables) {
  const int64_t S = p.T * p.K;
  tables->token = scratch_of<int32_t>(kBufferToken, S + 1);
  tables->gate = scratch_of<float>(kBufferGate, S + 1);
  if (!tables->token || !tables->gate) return false;
  const uint32_t K = static_cast<uint32_t>(p.K);
  for (int64_t s = 0; s < p.offsets[p.E]; s++) {
    tables->token[s] = static_cast<int32_t>(static_cast<uint32_t>(p.order[s]) / K);
    tables->gate[s] = p.gate[p.order[s]];
  }
  return true;
}

SPARSE_FFN_END
