// scratch.h - thread-local reusable buffers. Not compiled per instruction set.
#pragma once
#include <cstddef>

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
// At the end of a call: frees the calling thread's shared buffers if they hold more than kMostKept, for they grow with the
// number of tokens. The workers' own depend on the layer.
void limit_scratch();

}  // namespace sparse_ffn
