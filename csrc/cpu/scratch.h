// scratch.h - thread-local reusable buffers. Not compiled per instruction set.
#pragma once
#include <cstddef>
#include <cstdint>

namespace sparse_ffn {

// What a buffer is for. Each thread has one of each.
enum Buffer {
  kBufferA, kBufferB, kBufferC, kBufferAcc, kBufferLines, kBufferRank, kBufferIndex, kBufferKey,  // owned by each worker
  kBufferToken, kBufferGate, kBufferHidden, kBufferDUp,  // owned by the calling thread, shared with its workers
  kBufferOrder, kBufferOffsets, kBufferAux, kBufferLogits, kBufferDlogits, kBufferPartial, kBufferDgate, kBufferCount,
  kFirstShared = kBufferToken
};

// At least `bytes` bytes, 4096-aligned, contents undefined, valid until the next call with the same purpose on
// this thread. Null when out of memory.
void* scratch(Buffer purpose, size_t bytes);
// The same for `count` of T. Null, too, where that is more than there can be. Inlined, since the code of one instruction
// set must not stand for another's.
template <class T> static inline __attribute__((always_inline)) T* scratch_of(Buffer purpose, int64_t count) {
  if (count < 0 || count > PTRDIFF_MAX / 2 / static_cast<int64_t>(sizeof(T))) return nullptr;
  return static_cast<T*>(scratch(purpose, static_cast<size_t>(count) * sizeof(T)));
}

// At the end of a call: frees the calling thread's shared buffers if they hold more than kMostKept, for they grow with the
// number of tokens. Most of the workers' own depend on the layer.
void limit_scratch();
// At the end of a parallel region whose workers' sums, kBufferAcc, grow with the number of tokens: each frees its own if
// they hold more than kMostOfAWorker. The other buffers stay, for the next call needs them as large.
void limit_own_scratch();

}  // namespace sparse_ffn
