// bag_slots.h - the slots of a weighted bag sorted by value row: what lets one pass over the table serve all of its reads.
#pragma once
#include "problem.h"
#include "threads.h"
#include "types.h"

SPARSE_FFN_BEGIN

struct SortedSlots {
  int32_t* begin;   // [N + 1]: row n owns sorted positions begin[n] .. begin[n + 1] - 1, in the order of its slots
  int32_t* order;   // [S]: sorted position -> slot
  int32_t* token;   // [S]: its token
  float* weight;    // [S]: its weight
  int32_t* next;    // [threads, N], of the sort
  int64_t threads;

  // In scratch of the calling thread.
  static SortedSlots reserve(const sparse_ffn_bag& p) {
    const int64_t S = p.T * p.J;
    // Threads write side by side into each row's slots: where a thread's share of them is less than half a cache line, they
    // wait for each other's lines longer than one thread sorts (measured: 150 us against 30, 3 slots a row).
    const int64_t threads = larger<int64_t>(1, lesser<int64_t>(p.n_threads, S / (8 * (p.N + 1))));
    return {scratch_of<int32_t>(kBufferOffsets, p.N + 1), scratch_of<int32_t>(kBufferOrder, S + 1),
            scratch_of<int32_t>(kBufferToken, S + 1),     scratch_of<float>(kBufferGate, S + 1),
            scratch_of<int32_t>(kBufferPartial, threads * p.N + 1), threads};
  }
  bool ready() const { return begin && order && token && weight && next; }

  // First row of part i of `parts`, equal in slots and rows.
  int64_t part(int64_t N, int64_t i, int64_t parts) const {
    if (i == parts) return N;
    const int64_t goal = (begin[N] + N) * i / parts;
    int64_t lo = 0, hi = N;
    while (lo < hi) {
      const int64_t mid = (lo + hi) / 2;
      if (begin[mid] + mid < goal) lo = mid + 1; else hi = mid;
    }
    return lo;
  }
};

// Stable counting sort of all slots; threads count and place ranges of tokens.
template <class T> static void sort_bag_slots(const sparse_ffn_bag& p, const SortedSlots& s) {
  const T* weight = static_cast<const T*>(p.weight);
  int32_t* next = s.next;
#pragma omp parallel num_threads(team(s.threads, p.n_threads))
  {
    const int64_t n = lesser<int64_t>(thread_count(), s.threads), i = thread_index();
    const int64_t first = lesser(p.T, p.T * i / n), last = lesser(p.T, p.T * (i + 1) / n);  // none for i >= n
    int32_t* mine = next + i * p.N;
    if (i < n) memset(mine, 0, static_cast<size_t>(p.N) * 4);
    for (int64_t slot = first * p.J; slot < last * p.J; slot++) mine[p.index[slot]]++;
#pragma omp barrier
#pragma omp single
    {
      int32_t total = 0;
      for (int64_t r = 0; r < p.N; r++) {
        s.begin[r] = total;
        for (int64_t j = 0; j < n; j++) {
          const int32_t count = next[j * p.N + r];
          next[j * p.N + r] = total;
          total += count;
        }
      }
      s.begin[p.N] = total;
    }
    for (int64_t t = first; t < last; t++)
      for (int64_t slot = t * p.J; slot < (t + 1) * p.J; slot++) {
        const int32_t at = mine[p.index[slot]]++;
        s.order[at] = static_cast<int32_t>(slot);
        s.token[at] = static_cast<int32_t>(t);
        s.weight[at] = to_float(weight[slot]);
      }
  }
}

SPARSE_FFN_END
