// scratch.h - thread-local reusable buffers. Not compiled per instruction set.
#pragma once
#include <cstddef>

namespace sparse_ffn {

// What a buffer is for; one buffer per purpose and thread.
enum Slot {
  kSlotA, kSlotB, kSlotC, kSlotAcc, kSlotLines, kSlotRank, kSlotIndex,  // owned by each worker
  kSlotToken, kSlotGate, kSlotHidden, kSlotDz, kSlotRow,  // owned by the calling thread, shared with its workers
  kSlotOrder, kSlotOffsets, kSlotAux, kSlotLogits, kSlotDlogits, kSlotPartial, kSlotDgate, kSlotCount
};

// At least `bytes` bytes, 4096-aligned, contents undefined, valid until the next call with the same slot on this
// thread. Null when out of memory.
void* scratch(Slot slot, size_t bytes);
void release_scratch();

// Ask for huge pages behind a large output that is about to be written for the first time: page faults otherwise cost
// as much as the arithmetic that fills a fresh weight gradient.
void advise_huge_pages(void* p, size_t bytes);

}  // namespace sparse_ffn
