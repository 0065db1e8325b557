// large_memory.cpp - see large_memory.h.
//
// A gradient lives for a step and is as large in the next. Returned to the system in between, its pages are cleared and
// mapped again each time, which took a fifth of a training step on one core while the others waited (measured).
#include "large_memory.h"

#include <cstdlib>
#include <mutex>
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace sparse_ffn {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr int kMostPieces = 64;

// Freed memory, the oldest first. Nobody waits for the mutex: in a process that was forked while another thread held it, it
// stays locked. Whoever finds it locked takes memory from the system, or gives it back.
struct Kept {
  std::mutex mutex;
  void* memory[kMostPieces];
  size_t size[kMostPieces];
  int count = 0;
  size_t total = 0;

  void* remove(int i) {
    void* taken = memory[i];
    total -= size[i];
    for (count--; i < count; i++) {
      memory[i] = memory[i + 1];
      size[i] = size[i + 1];
    }
    return taken;
  }
};
// Made when the library is loaded: a fork would leave a static of a function half made. Never destroyed: tensors may outlive
// the statics of a library.
Kept& kept = *new Kept;

size_t whole_pages(size_t bytes) { return (bytes + kHugePage - 1) / kHugePage * kHugePage; }

#if defined(__linux__) && defined(MADV_POPULATE_WRITE)
const bool several_memory_nodes = !access("/sys/devices/system/node/node1", F_OK);
#endif

// Asks for huge pages behind fresh memory that is about to be written, and maps them: page faults otherwise cost as much as
// the arithmetic that fills a weight gradient. p begins a page. Advice only: failure is harmless.
void map_huge_pages(void* p, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  madvise(p, bytes, MADV_HUGEPAGE);
#if defined(MADV_POPULATE_WRITE)
  // All pages in one call: threads that fault side by side wait for each other. Of several nodes each page is to lie with the
  // thread that writes it.
  if (!several_memory_nodes) madvise(p, bytes, MADV_POPULATE_WRITE);
#endif
#else
  (void)p;
  (void)bytes;
#endif
}

}  // namespace

void* take_memory(size_t bytes) {
  const size_t size = whole_pages(bytes);
  {
    const std::unique_lock<std::mutex> lock(kept.mutex, std::try_to_lock);
    for (int i = lock ? kept.count - 1 : -1; i >= 0; i--)  // the one freed last is the likeliest to be in a cache
      if (kept.size[i] == size) return kept.remove(i);
  }
  void* memory = nullptr;
  if (posix_memalign(&memory, kHugePage, size)) {
    release_memory();
    if (posix_memalign(&memory, kHugePage, size)) return nullptr;
  }
  map_huge_pages(memory, bytes);
  return memory;
}

void free_memory(void* memory, size_t bytes) {
  const size_t size = whole_pages(bytes);
#if defined(__SANITIZE_ADDRESS__)
  const bool keep = false;  // so that a use after this is seen
#else
  const bool keep = memory && size <= kMostKept;
#endif
  void* given_back[kMostPieces] = {memory};
  int count = 1;
  if (keep) {
    const std::unique_lock<std::mutex> lock(kept.mutex, std::try_to_lock);
    if (lock) {
      count = 0;
      while (kept.count == kMostPieces || kept.total + size > kMostKept) given_back[count++] = kept.remove(0);
      kept.memory[kept.count] = memory;
      kept.size[kept.count++] = size;
      kept.total += size;
    }
  }
  for (int i = 0; i < count; i++) free(given_back[i]);
}

void release_memory() {
  void* given_back[kMostPieces];
  int count = 0;
  {
    const std::unique_lock<std::mutex> lock(kept.mutex, std::try_to_lock);
    while (lock && kept.count) given_back[count++] = kept.remove(0);
  }
  for (int i = 0; i < count; i++) free(given_back[i]);
}

}  // namespace sparse_ffn
