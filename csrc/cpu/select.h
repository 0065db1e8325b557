// select.h - exact top-k of one row in torch.topk's order: NaN before infinity, then by value descending; ties, also
// among NaNs, to the lower index.
// Values become integers of the same order. Vectorised passes drop what cannot be selected until hardly more than k
// candidates are left, in index order; counting for each of them how many come before it then gives its place. There is
// hardly a branch that depends on the data.
#pragma once
#include "vec.h"

SPARSE_FFN_BEGIN

constexpr int32_t kLowest = -0x7fffffff - 1;  // below every value
constexpr int32_t kNan = 0x7fc00000;          // above infinity

// Ascending with the value; -0 equals +0; all NaNs are equal, and above everything.
static ALWAYS_INLINE VI ordered(V v) {
  const VI u = reinterpret_cast<VI>(v == zero() ? zero() : v);
  const VI rank = u ^ ((u >> 31) & 0x7fffffff);
  return v != v ? VI{} + kNan : rank;
}

static ALWAYS_INLINE float value_of(int32_t rank) {
  return float_of(static_cast<uint32_t>(rank < 0 ? rank ^ 0x7fffffff : rank));
}

// Candidates: values and what they stand for, in the order in which ties are resolved.
struct Candidates {
  int32_t* value;
  int32_t* index;
  uint64_t* key;  // as many, for long selections

  // None null when ready; n candidates at most.
  static Candidates reserve(int64_t n) {
    const int64_t room = round_up(n, VL) + 2 * VL;
    return {scratch_of<int32_t>(kBufferRank, room), scratch_of<int32_t>(kBufferIndex, room),
            scratch_of<uint64_t>(kBufferKey, room)};
  }
  bool ready() const { return value && index && key; }
  // Appends the marked lanes at `count`; returns the new count. Up to VL elements beyond it are overwritten.
  int64_t append(int64_t count, VI v, VI i, uint32_t lanes) const {
    compress(value + count, v, lanes);
    compress(index + count, i, lanes);
    return count + __builtin_popcount(lanes);
  }
};

static ALWAYS_INLINE VI iota() {
  VI i{};
  for (int j = 0; j < VL; j++) i[j] = j;
  return i;
}
static ALWAYS_INLINE uint32_t first_lanes(int64_t n) { return n >= VL ? (uint32_t{1} << VL) - 1 : (uint32_t{1} << n) - 1; }

static inline int64_t count_from(const int32_t* value, int64_t count, int64_t threshold) {
  int64_t n = 0;
  for (int64_t i = 0; i < count; i += VL)
    n += __builtin_popcount(lanes_of(load(value + i) >= VI{} + static_cast<int32_t>(threshold)) & first_lanes(count - i));
  return n;
}

// Drops candidates that cannot be among the k best. Every value is at least `least`. Returns how many are left.
static inline int64_t prune(const Candidates& c, int64_t count, int64_t k, int32_t least) {
  if (count <= k + VL) return count;
  VI most = VI{} + kLowest;
  for (int64_t i = 0; i < count; i += VL) {
    const VI v = load(c.value + i);
    most = v > most ? v : most;  // lanes past the end only loosen the bound
  }
  int64_t lo = least, hi = kLowest;  // at least k reach lo; fewer than k reach hi
  for (int i = 0; i < VL; i++) hi = most[i] > hi ? most[i] : hi;
  hi++;
  for (int step = 0; hi - lo > 1; step++) {
    // Halving the values gets there in few steps; halving their ranks gets there in any case.
    int64_t middle = lo + (hi - lo) / 2;
    if (step < 8) {
      const int64_t rank = ordered(splat(0.5f * value_of(static_cast<int32_t>(lo)) +
                                         0.5f * value_of(static_cast<int32_t>(hi - 1))))[0];
      if (rank > lo && rank < hi) middle = rank;
    }
    const int64_t n = count_from(c.value, count, middle);
    if (n < k) { hi = middle; continue; }
    lo = middle;
    if (n <= k + VL / 2) break;
  }
  // If the search closed in, the first of those equal to lo make up the number.
  int64_t spare = hi - lo > 1 ? count : k - count_from(c.value, count, hi);
  int64_t kept = 0;
  const VI bound = VI{} + static_cast<int32_t>(lo);
  for (int64_t i = 0; i < count; i += VL) {
    const VI v = load(c.value + i), index = load(c.index + i);
    const uint32_t valid = first_lanes(count - i);
    uint32_t equal = lanes_of(v == bound) & valid;
    while (__builtin_popcount(equal) > spare) equal &= ~(uint32_t{1} << (31 - __builtin_clz(equal)));
    spare -= __builtin_popcount(equal);
    kept = c.append(kept, v, index, (lanes_of(v > bound) & valid) | equal);
  }
  return kept;
}

// Long selections: heap sort of 64-bit keys (no recursion, no allocation).
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
  for (int64_t i = n / 2; i-- > 0;) sift_down(key, i, n);
  for (int64_t m = n - 1; m > 0; m--) {
    const uint64_t t = key[0];
    key[0] = key[m];
    key[m] = t;
    sift_down(key, 0, m);
  }
}

constexpr int64_t kCounted = 512;  // candidates up to which counting, which is quadratic, beats sorting

// The k best of count >= k candidates, best first: what they stand for. best has room for all candidates.
static inline void select_candidates(const Candidates& c, int64_t count, int64_t k, int32_t least, int32_t* best) {
  count = prune(c, count, k, least);
  if (count > kCounted) {
    for (int64_t i = 0; i < count; i++)
      c.key[i] = static_cast<uint64_t>(static_cast<uint32_t>(c.value[i]) ^ 0x80000000u) << 32 |
                 (0xffffffffu - static_cast<uint32_t>(i));
    sort_descending(c.key, count);
    for (int64_t j = 0; j < k; j++) best[j] = c.index[0xffffffffu - static_cast<uint32_t>(c.key[j])];
    return;
  }
  const VI lane = iota();
  for (int64_t b = 0; b < count; b += VL) {
    const VI v = load(c.value + b);
    const int64_t inside = lesser<int64_t>(b + VL, count);
    VI place{};  // how many come before
    int64_t j = 0;
    for (; j < b; j++) place -= VI{} + c.value[j] >= v;
    for (; j < inside; j++) {
      const VI other = VI{} + c.value[j];
      place -= (other > v) | ((other == v) & (lane > static_cast<int32_t>(j - b)));
    }
    for (; j < count; j++) place -= VI{} + c.value[j] > v;
    for (int64_t i = 0; i < inside - b; i++) best[place[i]] = c.index[b + i];  // all: a branch would be a coin toss
  }
}

// The k best of row [n], best first; best has room for n.
// The row is split into at least k disjoint parts (a lane of a group of vectors each). At least k values reach the
// smallest of the parts' maxima, so one pass drops all values below it.
static inline void select_row(const float* row, int64_t n, int64_t k, const Candidates& c, int32_t* best) {
  if (k <= 0) return;
  const int64_t groups = ceil_div(k, VL), vectors = n / VL / groups;
  int32_t least = kLowest;
  if (vectors >= 2) {
    VI threshold = VI{} + 0x7fffffff;
    for (int64_t g = 0; g < groups; g++) {
      VI most = VI{} + kLowest;
      for (int64_t i = g * vectors; i < (g + 1) * vectors; i++) {
        const VI v = ordered(load(row + i * VL));
        most = v > most ? v : most;
      }
      threshold = most < threshold ? most : threshold;
    }
    least = threshold[0];
    for (int i = 1; i < VL; i++) least = threshold[i] < least ? threshold[i] : least;
  }
  const VI lane = iota();
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += VL) {
    const VI v = ordered(load_upto(row + i, n - i));
    count = c.append(count, v, lane + static_cast<int32_t>(i), lanes_of(v >= VI{} + least) & first_lanes(n - i));
  }
  select_candidates(c, count, k, least, best);
}

SPARSE_FFN_END
