// scratch.cpp - see scratch.h.
#include "scratch.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace sparse_ffn {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kPage = 4096;

struct Buffers {
  void* data[kBufferCount] = {};
  size_t size[kBufferCount] = {};
  void release() {
    for (int i = 0; i < kBufferCount; i++) {
      free(data[i]);
      data[i] = nullptr;
      size[i] = 0;
    }
  }
  ~Buffers() { release(); }
};
thread_local Buffers buffers;

#if defined(__linux__) && defined(MADV_POPULATE_WRITE)
bool several_memory_nodes() {
  static const bool several = !access("/sys/devices/system/node/node1", F_OK);
  return several;
}
#endif

}  // namespace

void advise_huge_pages(void* p, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < kHugePage) return;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(p) + kPage - 1) / kPage * kPage;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(p) + bytes) / kPage * kPage;
  // advice only: failure is harmless
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#if defined(MADV_POPULATE_WRITE)
  // All pages in one call: threads that fault side by side wait for each other. Of several nodes each page is to lie with the
  // thread that writes it.
  if (!several_memory_nodes()) madvise(reinterpret_cast<void*>(first), last - first, MADV_POPULATE_WRITE);
#endif
#else
  (void)p;
  (void)bytes;
#endif
}

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

void release_scratch() { buffers.release(); }

}  // namespace sparse_ffn
