// select.h - exact top-k of one row, by value descending, ties to the lower index, NaN last.
// Every candidate becomes one 64-bit key: the value's bits in an order that integers share, then the inverted index. Keys
// are unique, so "the k largest keys" has one answer and needs no rule for ties.
#pragma once
#include "vec.h"

SPARSE_FFN_BEGIN

// Ascending with the value; -0 equals +0; NaN below everything.
static ALWAYS_INLINE uint32_t rank_of(float v) {
  if (v != v) return 0;
  if (v == 0) v = 0;
  const uint32_t u = bits_of(v);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}
static ALWAYS_INLINE uint64_t key_of(float v, int64_t index) {
  return static_cast<uint64_t>(rank_of(v)) << 32 | (0xffffffffu - static_cast<uint32_t>(index));
}
static ALWAYS_INLINE int64_t index_of(uint64_t key) { return 0xffffffffu - static_cast<uint32_t>(key); }

// Puts the k largest of n keys first, in no order (quickselect, median of three).
static inline void partition_largest(uint64_t* key, int64_t n, int64_t k) {
  int64_t lo = 0, hi = n - 1;
  while (lo < hi) {
    const uint64_t a = key[lo], b = key[lo + (hi - lo) / 2], c = key[hi];
    const uint64_t pivot = a < b ? (b < c ? b : (a < c ? c : a)) : (a < c ? a : (b < c ? c : b));
    int64_t i = lo, j = hi;
    while (i <= j) {
      while (key[i] > pivot) i++;
      while (key[j] < pivot) j--;
      if (i <= j) {
        const uint64_t t = key[i];
        key[i++] = key[j];
        key[j--] = t;
      }
    }
    if (k - 1 <= j) hi = j;
    else if (k - 1 >= i) lo = i;
    else return;
  }
}

// Descending, in place: insertion for short lists, else heap sort (no recursion, no allocation).
static inline void sift_down(uint64_t* key, int64_t i, int64_t n) {  // a heap with the smallest on top
  const uint64_t v = key[i];
  for (int64_t child; (child = 2 * i + 1) < n; i = child) {
    if (child + 1 < n && key[child + 1] < key[child]) child++;
    if (key[child] >= v) break;
    key[i] = key[child];
  }
  key[i] = v;
}
static inline void sort_descending(uint64_t* key, int64_t n) {
  if (n <= 48) {
    for (int64_t i = 1; i < n; i++) {
      const uint64_t v = key[i];
      int64_t j = i;
      for (; j > 0 && key[j - 1] < v; j--) key[j] = key[j - 1];
      key[j] = v;
    }
    return;
  }
  for (int64_t i = n / 2; i-- > 0;) sift_down(key, i, n);
  for (int64_t m = n - 1; m > 0; m--) {
    const uint64_t t = key[0];
    key[0] = key[m];
    key[m] = t;
    sift_down(key, 0, m);
  }
}

// Keys of the values that reach the threshold; returns how many.
static inline int64_t keys_from(const float* row, int64_t n, float threshold, uint64_t* keys) {
  int64_t count = 0, i = 0;
  for (; i + VL <= n; i += VL)
    for (uint32_t lanes = lanes_of(load(row + i) >= splat(threshold)); lanes; lanes &= lanes - 1) {
      const int64_t at = i + __builtin_ctz(lanes);
      keys[count++] = key_of(row[at], at);
    }
  for (; i < n; i++)
    if (row[i] >= threshold) keys[count++] = key_of(row[i], i);
  return count;
}

// The k best of row [n] as keys, best first. keys: n of scratch.
// The row is split into at least k disjoint parts (a lane of a group of vectors each). At least k values reach the smallest
// of the parts' maxima, so one vectorised pass drops all values below it, and the exact selection sees the rest.
static inline void select_row(const float* row, int64_t n, int64_t k, uint64_t* keys) {
  int64_t count = 0;
  const int64_t groups = ceil_div(k, VL), vectors = n / VL / larger<int64_t>(groups, 1);
  if (k > 0 && vectors >= 2) {
    const V lowest = splat(-__builtin_inff());
    V threshold = splat(__builtin_inff());
    for (int64_t g = 0; g < groups; g++) {
      V best = lowest;
      for (int64_t i = g * vectors; i < (g + 1) * vectors; i++) {
        const V v = load(row + i * VL);
        best = v > best ? v : best;
      }
      threshold = best < threshold ? best : threshold;
    }
    float least = threshold[0];
    for (int i = 1; i < VL; i++) least = threshold[i] < least ? threshold[i] : least;
    count = keys_from(row, n, least, keys);
  }
  if (count < k) {  // short rows, or NaN
    count = n;
    for (int64_t i = 0; i < n; i++) keys[i] = key_of(row[i], i);
  }
  if (k < count) partition_largest(keys, count, k);
  sort_descending(keys, k);
}

SPARSE_FFN_END
