// scratch.cpp - see scratch.h.
#include "scratch.h"

#include <cstdlib>
#include <cstring>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "large_memory.h"

namespace sparse_ffn {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kPage = 4096;
constexpr size_t kMostOfAWorker = size_t{16} << 20;

struct Buffers {
  void* data[kBufferCount] = {};
  size_t size[kBufferCount] = {};
  void release(int first, int last) {
    for (int i = first; i < last; i++) {
      free(data[i]);
      data[i] = nullptr;
      size[i] = 0;
    }
  }
  ~Buffers() { release(0, kBufferCount); }
};
thread_local Buffers buffers;

}  // namespace

#if defined(__SANITIZE_ADDRESS__)
// A fresh buffer of exactly this size, full of NaN: overruns, stale pointers and reads of old contents show.
void* scratch(Buffer purpose, size_t bytes) {
  free(buffers.data[purpose]);
  if (posix_memalign(&buffers.data[purpose], kPage, bytes)) buffers.data[purpose] = nullptr;
  else memset(buffers.data[purpose], 0xff, bytes);
  return buffers.data[purpose];
}
#else
void* scratch(Buffer purpose, size_t bytes) {
  if (buffers.size[purpose] < bytes || !buffers.data[purpose]) {
    free(buffers.data[purpose]);
    const size_t alignment = bytes >= kHugePage / 2 ? kHugePage : kPage;
    const size_t size = (bytes + bytes / 8 + alignment) / alignment * alignment;
    buffers.data[purpose] = aligned_alloc(alignment, size);
    if (!buffers.data[purpose]) {
      release_memory();
      buffers.data[purpose] = aligned_alloc(alignment, size);
    }
    buffers.size[purpose] = buffers.data[purpose] ? size : 0;
    if (buffers.data[purpose]) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
      if (alignment == kHugePage) madvise(buffers.data[purpose], size, MADV_HUGEPAGE);
#endif
    }
  }
  return buffers.data[purpose];
}
#endif

void limit_scratch() {
  size_t total = 0;
  for (int i = kFirstShared; i < kBufferCount; i++) total += buffers.size[i];
  if (total > kMostKept) buffers.release(kFirstShared, kBufferCount);
}

void limit_own_scratch() {
  if (buffers.size[kBufferAcc] > kMostOfAWorker) buffers.release(kBufferAcc, kBufferAcc + 1);
}

}  // namespace sparse_ffn
