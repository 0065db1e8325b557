// product_key.cpp - the k best of the n * n sums of two score tables, and the gradient of the tables.
#include "ops.h"
#include "select.h"

SPARSE_FFN_BEGIN

// Scratch of one thread.
struct ProductScratch {
  Candidates candidates;
  int32_t* half;   // the best of both halves, first and second [n] each
  float* value;    // their scores, each padded to whole vectors
  int32_t* best;   // pairs as positions (i << 16 | j)
  bool ready() const { return candidates.ready() && half && value && best; }
};

// A bound that at least k sums reach: the first a of one half and the first ceil(k / a) of the other make k pairs, and the
// last pair of them has the smallest sum. Where that is NaN it bounds nothing: inf - inf ranks above its neighbours.
static int32_t least_sum(const float* first, const float* second, int64_t m, int64_t k) {
  float best = -__builtin_inff();
  for (int64_t a = 1; a <= m; a++) {
    const int64_t b = ceil_div(k, a);
    if (b > m) continue;
    const float sum = first[a - 1] + second[b - 1];
    best = sum > best ? sum : best;
  }
  return ordered(splat(best))[0];
}

// Pair (i, j) is beaten or preceded by all (i', j') with i' <= i and j' <= j, so it can be among the k best only if
// (i + 1)(j + 1) <= k: about k ln k pairs of k^2.
static int64_t pairs_from(const ProductScratch& s, int64_t m, int64_t k, int32_t least) {
  const float* second = s.value + round_up(m, VL);
  const VI lane = iota();
  int64_t count = 0;
  for (int64_t i = 0; i < m; i++) {
    const int64_t width = lesser(m, k / (i + 1));
    for (int64_t j = 0; j < width; j += VL) {
      const VI v = ordered(splat(s.value[i]) + load(second + j));
      const uint32_t lanes = lanes_of(v >= VI{} + least) & first_lanes(width - j);
      if (!lanes) continue;
      count = s.candidates.append(count, v, lane + static_cast<int32_t>(i << 16 | j), lanes);
    }
  }
  return count;
}

static void product_row(const float* first, const float* second, int64_t n, int64_t k, const ProductScratch& s,
                        int64_t* index, float* sums) {
  const int64_t m = lesser(k, n), padded = round_up(m, VL);
  for (int h = 0; h < 2; h++) {
    const float* row = h ? second : first;
    select_row(row, n, m, s.candidates, s.half + h * n);
    for (int64_t i = 0; i < m; i++) s.value[h * padded + i] = row[s.half[h * n + i]];
  }
  const int32_t least = least_sum(s.value, s.value + padded, m, k);
  const int64_t count = pairs_from(s, m, k, least);
  select_candidates(s.candidates, count, k, least, s.best);
  for (int64_t c = 0; c < k; c++) {
    const int32_t i = s.best[c] >> 16, j = s.best[c] & 0xffff;
    index[c] = s.half[i] * n + s.half[n + j];
    if (sums) sums[c] = s.value[i] + s.value[padded + j];
  }
}

int product_key_topk(const sparse_ffn_product_keys& p, const float* scores, int64_t* index, float* sums) {
  const int64_t m = lesser(p.k, p.n);
  int64_t pairs = 0;  // with (i + 1)(j + 1) <= k
  for (int64_t i = 0; i < m; i++) pairs += lesser(m, p.k / (i + 1));
  const int64_t most = larger(p.n, pairs);
  int failed = 0;
#pragma omp parallel num_threads(larger(1, p.n_threads))
  {
    const ProductScratch s = {Candidates::reserve(most), scratch_of<int32_t>(kBufferC, 2 * p.n),
                              scratch_of<float>(kBufferA, 2 * round_up(m, VL)), scratch_of<int32_t>(kBufferB, most)};
    const bool ready = s.ready();
    if (!ready) {
#pragma omp atomic write
      failed = 1;
    }
#pragma omp for schedule(static)
    for (int64_t r = 0; r < p.T * p.H; r++) {
      if (!ready) continue;
      const float* first = scores + r / p.H * p.stride_t + r % p.H * p.stride_h;
      product_row(first, first + p.stride_s, p.n, p.k, s, index + r * p.k, sums ? sums + r * p.k : nullptr);
    }
  }
  return failed ? SPARSE_FFN_NO_MEMORY : SPARSE_FFN_OK;
}

int product_key_topk_backward(const sparse_ffn_product_keys& p, const float* dsums, const int64_t* index,
                              float* dscores) {
#pragma omp parallel for num_threads(larger(1, p.n_threads)) schedule(static)
  for (int64_t r = 0; r < p.T * p.H; r++) {
    float* first = dscores + r / p.H * p.stride_t + r % p.H * p.stride_h;
    float* second = first + p.stride_s;
    memset(first, 0, static_cast<size_t>(p.n) * 4);
    memset(second, 0, static_cast<size_t>(p.n) * 4);
    const uint32_t n = static_cast<uint32_t>(p.n);
    for (int64_t c = r * p.k; c < (r + 1) * p.k; c++) {
      const uint32_t unit = static_cast<uint32_t>(index[c]);
      first[unit / n] += dsums[c];
      second[unit % n] += dsums[c];
    }
  }
  return SPARSE_FFN_OK;
}

SPARSE_FFN_END
