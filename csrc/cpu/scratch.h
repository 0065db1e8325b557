// scratch.h - thread-local reusable buffers. Not compiled per instruction set.
#pragma once
#include <cstddef>

namespace sparse_ffn {

// What a buffer is for. Each thread has one of each.
enum Buffer {
  kBufferA, kBufferB, kBufferC, kBufferAcc, kBufferLines, kBufferRank, kBufferIndex, kBufferKey,  // owned by each worker
  kBufferToken, kBufferGate, kBufferHidden, kBufferDUp,  // owned by the calling thread, shared with its workers
  kBufferOrder, kBufferOffsets, kBufferAux, kBufferLogits, kBufferDlogits, kBufferPartial, kBufferDgate, kBufferCount
};

// At least `bytes` bytes, 4096-aligned, contents undefined, valid until the next call with the same purpose on
// this thread. Null when out of memory.
void* scratch(Buffer purpose, size_t bytes);
void release_scratch();

// Ask for huge pages behind fresh memory that is about to be written, and map them: page faults otherwise cost as much as
// the arithmetic that fills a weight gradient. Memory that is mapped already costs 0.1 us for each small page.
void advise_huge_pages(void* p, size_t bytes);

}  // namespace sparse_ffn
