// line_queue.h - the cache lines that will be needed next. The micro-kernels fetch one of them per word of k, so that
// weights and gathered rows arrive from L3 or memory behind the arithmetic instead of being waited for while packing.
#pragma once
#include "tile.h"

SPARSE_FFN_BEGIN

class LineQueue {
 public:
  // False when out of memory.
  bool reserve(int64_t most) {
    lines_ = scratch_of<const void*>(kBufferLines, most + 2 * kKBlock);
    return lines_ != nullptr;
  }
  void clear() { n_ = next_ = 0; }
  void add(const void* p, int64_t bytes) {
    const char* line = static_cast<const char*>(p);
    for (int64_t i = 0; i < bytes; i += 64) lines_[n_++] = line + i;
  }
  void seal() {  // a kernel may read past the end by its k
    for (int64_t i = 0; i < 2 * kKBlock; i++) lines_[n_ + i] = kNoLines[0];
  }
  Lines take(int64_t k) {
    if (next_ >= n_) return kNoLines;
    const Lines from = lines_ + next_;
    next_ += k;
    return from;
  }

 private:
  const void** lines_ = nullptr;
  int64_t n_ = 0, next_ = 0;
};

SPARSE_FFN_END
