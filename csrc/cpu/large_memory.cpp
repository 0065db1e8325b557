// large_memory.cpp - see large_memory.h.
//
// A gradient lives for a step and is as large in the next. Returned to the system in between, its pages are cleared and
// mapped again each time, which took a fifth of a training step on one core while the others waited (measured).
#include "large_memory.h"

#include <atomic>
#include <cstdlib>
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace sparse_ffn {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr int kMostPieces = 64;

// Freed memory, the oldest first. Nobody waits for a turn: in a process that was forked while another thread had it, it does
// not end. Whoever gets none takes memory from the system, or gives it back.
struct Kept {
  std::atomic_flag taken = ATOMIC_FLAG_INIT;
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
class Turn {
 public:
  explicit Turn(Kept& kept) : kept_(kept), mine_(!kept.taken.test_and_set(std::memory_order_acquire)) {}
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;
  ~Turn() {
    if (mine_) kept_.taken.clear(std::memory_order_release);
  }
  explicit operator bool() const { return mine_; }

 private:
  Kept& kept_;
  const bool mine_;
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
    const Turn mine(kept);
    for (int i = mine ? kept.count - 1 : -1; i >= 0; i--)  // the one freed last is the likeliest to be in a cache
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
    if (const Turn mine(kept); mine) {
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
    const Turn mine(kept);
    while (mine && kept.count) given_back[count++] = kept.remove(0);
  }
  for (int i = 0; i < count; i++) free(given_back[i]);
}

}  // namespace sparse_ffn
