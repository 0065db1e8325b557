// call.h - what the functions of the C interface share: check the tensors of a call, then give its kernels pointers. Not
// compiled per instruction set.
#pragma once
#include <cstring>

#include "../cpu/kernel_table.h"
#include "../cpu/phases.h"
#include "../cpu/scratch.h"
#include "operands.h"

namespace sparse_ffn {

// What a call returns whose kernels have run.
inline int done(int status) {
  limit_scratch();
  return status == SPARSE_FFN_NO_MEMORY ? refuse(status, "the CPU core is out of memory") : status;
}

inline void zero(void* out, int64_t count, int32_t dtype) {
  memset(out, 0, static_cast<size_t>(count) * (dtype == SPARSE_FFN_FP32 ? 4 : 2));
}

// Stable counting sort of the slots by expert; returns the order. Void slots, E or more, come last: offsets[E] is the number
// of all others. The counts themselves become the next free positions, and end as where the experts after them begin.
inline const int32_t* sort_by_expert(const int64_t* index, int64_t S, int64_t E, int32_t* order, int32_t* offsets) {
  memset(offsets, 0, static_cast<size_t>(E + 1) * sizeof(int32_t));
  for (int64_t s = 0; s < S; s++) offsets[index[s] < E ? index[s] : E]++;
  int32_t total = 0;
  for (int64_t e = 0; e <= E; e++) {
    const int32_t count = offsets[e];
    offsets[e] = total;
    total += count;
  }
  for (int64_t s = 0; s < S; s++) order[offsets[index[s] < E ? index[s] : E]++] = static_cast<int32_t>(s);
  for (int64_t e = E; e > 0; e--) offsets[e] = offsets[e - 1];
  offsets[0] = 0;
  return order;
}

inline sparse_ffn_activation take_activation(Operands& o, int32_t number) {
  const bool known = number >= 0 && number <= SPARSE_FFN_LAST_ACTIVATION;
  o.require(known, "activation %d is unknown", number);
  return known ? static_cast<sparse_ffn_activation>(number) : SPARSE_FFN_RELU;
}

}  // namespace sparse_ffn
