// cut.h - which of a row's numbers are its k largest, without their order: the rank that cuts them off. Ties go to the lower
// position. A sort would cost more than the products that it saves.
#pragma once
#include "vec.h"

SPARSE_FFN_BEGIN

// Selected are all ranks above `rank`, and the first `equal` of those that equal it.
struct Cut {
  int32_t rank;
  int64_t equal;
};

// How a row of magnitudes, none of which is negative, becomes integers of the same order; NaN is above infinity, and all
// NaNs are equal. Shifting drops bits that are zero in all numbers of a row: it makes steps of a search out of gaps.
constexpr int32_t kInfinityRank = 0x7f800000;
static ALWAYS_INLINE VI rank_of(V magnitude, int shift) {
  const VI bits = reinterpret_cast<VI>(magnitude) & 0x7fffffff;
  return (bits > kInfinityRank ? VI{} + (kInfinityRank + 0x400000) : bits) >> shift;
}
constexpr int32_t kNoRank = -1;  // of lanes past the end of a row

static inline int64_t count_from(const int32_t* rank, int64_t n, int32_t least) {  // n is a multiple of VL
  VI count{};
  for (int64_t i = 0; i < n; i += VL) count -= load(rank + i) >= least;
  int64_t total = 0;
  for (int j = 0; j < VL; j++) total += count[j];
  return total;
}

// The cut of row [n], padded to whole vectors with kNoRank. `positive` of the ranks are above 0, the highest is `most`.
// guess: a rank near the cut, the previous row's say; it decides about the time and nothing else. part: room for n + VL.
static inline Cut find_cut(const int32_t* row, int64_t n, int64_t k, int64_t positive, int32_t most, int32_t guess,
                           int shift, int32_t* part) {
  if (positive <= k) return {0, k - positive};
  int64_t padded = round_up(n, VL);
  const int32_t* rank = row;
  int64_t lo = 1, reach_lo = positive, hi = int64_t{most} + 1, reach_hi = 0;  // reach_lo >= k > reach_hi reach them
  int64_t beyond = 0;  // ranks from hi on that `rank` lacks
  const int64_t near = int64_t{1 << 20} >> shift;  // a tenth, about
  for (int step = 0; reach_lo > k && hi - lo > 1; step++) {
    if (rank == row && (reach_lo - reach_hi) * 8 <= n) {
      int64_t kept = 0;
      for (int64_t i = 0; i < padded; i += VL) {
        const VI v = load(row + i);
        const uint32_t inside = lanes_of((v >= static_cast<int32_t>(lo)) & (v < static_cast<int32_t>(hi)));
        compress(part + kept, v, inside);
        kept += __builtin_popcount(inside);
      }
      padded = round_up(kept, VL);
      for (int64_t i = kept; i < padded; i++) part[i] = kNoRank;
      rank = part, beyond = reach_hi;
    }
    int64_t middle = lo + (hi - lo) / 2;
    if (step < 2) {
      const int64_t wanted = step ? guess - near : guess + near;
      if (wanted > lo && wanted < hi) middle = wanted;
    } else if (step % 4 != 3) {  // as if the values between were evenly spread; halving gets there in any case
      const float below = float_of(static_cast<uint32_t>(lo) << shift), above = float_of(static_cast<uint32_t>(hi - 1) << shift);
      float share = (static_cast<float>(reach_lo - k) + 0.5f) / static_cast<float>(reach_lo - reach_hi);
      if (rank == row) share = 0.25f + 0.5f * share;  // far from evenly
      const int64_t found = bits_of(below + (above - below) * share) >> shift;
      if (found > lo && found < hi) middle = found;
    }
    const int64_t reach = beyond + count_from(rank, padded, static_cast<int32_t>(middle));
    if (reach < k) hi = middle, reach_hi = reach; else lo = middle, reach_lo = reach;
  }
  if (reach_lo == k) return {static_cast<int32_t>(lo) - 1, 0};
  return {static_cast<int32_t>(lo), k - reach_hi};
}

SPARSE_FFN_END
