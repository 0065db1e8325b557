// router.cpp - scores, selection, gates, and the sums that balance losses need; the gradient: see router.h.
#include "router.h"

#include "gemm_rows.h"
#include "select.h"
#include "vec_math.h"

SPARSE_FFN_BEGIN

constexpr int64_t kChunk = 64;  // tokens whose softmax is summed in one go: a fixed number, whatever the threads

// logits [T, R] = x W^T in fp32.
template <class T> static bool score(const sparse_ffn_experts& p, const sparse_ffn_router& r, float* logits) {
  const int32_t offsets[2] = {0, static_cast<int32_t>(p.T)};
  RowGemm<T> g{};
  g.a = static_cast<const T*>(p.x);
  g.a_stride = p.x_stride;
  g.K = p.D;
  g.w[0] = static_cast<const T*>(r.weight);
  g.w_stride_row = p.D;
  g.N = r.rows;
  g.offsets = offsets;
  g.E = 1;
  g.n_threads = p.n_threads;
  return run_row_gemm(g, [&](const FinishedRow& f) { widen(logits + f.s * r.rows + f.n0, f.c[0], f.n); });
}

static float largest(const float* row, int64_t n) {
  float best = row[0];
  for (int64_t i = 1; i < n; i++) best = row[i] > best ? row[i] : best;
  return best;
}

static void softmax(const float* row, int64_t n, float* out) {
  const V top = splat(largest(row, n));
  V total = zero();
  for (int64_t i = 0; i < n; i += VL) {
    store_upto(out + i, vexp(load_upto(row + i, n - i) - top), n - i);
    total = total + load_upto(out + i, n - i);
  }
  const V scale = splat(1.f / sum(total));
  for (int64_t i = 0; i < n; i += VL) store_upto(out + i, load_upto(out + i, n - i) * scale, n - i);
}

constexpr int64_t kStruckOut = 3;  // up to so many by select_short: for more select_row is the faster (measured)

// The k best of a short row: k times the largest, which is struck out. score: a copy, padded to whole vectors with -inf.
// False where that would not do: nothing compares with a NaN, and -inf has no lower value to be replaced by.
static bool select_short(float* score, int64_t n, int64_t k, int64_t* index) {
  const float lowest = -__builtin_inff();
  for (int64_t i = 0; i < n; i += VL)
    if (lanes_of(load(score + i) > splat(lowest)) != first_lanes(n - i)) return false;
  for (int64_t j = 0; j < k; j++) {
    V best = load(score);
    for (int64_t i = VL; i < n; i += VL) {
      const V v = load(score + i);
      best = v > best ? v : best;
    }
    const V top = splat(largest(best));
    int64_t at = 0;
    for (int64_t i = 0; i < n; i += VL)
      if (const uint32_t lanes = lanes_of(load(score + i) == top)) {
        at = i + __builtin_ctz(lanes);
        break;
      }
    index[j] = at;
    score[at] = lowest;
  }
  return true;
}

static float sigmoid(float x) { return 1.f / (1.f + vexp(splat(-x))[0]); }

// Gates of one token. p: scratch of R.
static void gates(const sparse_ffn_experts& e, const sparse_ffn_router& r, const float* logits, const int64_t* index,
                  float* p, float* gate) {
  switch (r.gate_function) {
    case SPARSE_FFN_GATE_SIGMOID:
      for (int64_t j = 0; j < e.K; j++) gate[j] = sigmoid(logits[index[j]]);
      return;
    case SPARSE_FFN_GATE_SOFTMAX:
      softmax(logits, r.rows, p);
      for (int64_t j = 0; j < e.K; j++) gate[j] = p[index[j]];
      return;
    case SPARSE_FFN_GATE_SOFTMAX_TOPK:
      for (int64_t j = 0; j < e.K; j++) p[j] = logits[index[j]];
      softmax(p, e.K, gate);
      return;
    case SPARSE_FFN_GATE_UNWEIGHTED:
      for (int64_t j = 0; j < e.K; j++) gate[j] = 1.f + 0.f * logits[index[j]];  // NaN where the score is no number
  }
}

int route_tokens(const sparse_ffn_experts& p, const sparse_ffn_router& r, int64_t* index, float* gate,
                 float* softmax_sums) {
  const int64_t R = r.rows;
  float* logits = scratch_of<float>(kBufferLogits, p.T * R + 1);
  const int64_t groups = r.groups, length = p.T / groups;
  const int64_t per_group = ceil_div(length, kChunk), chunks = per_group * groups;
  float* partial = softmax_sums ? scratch_of<float>(kBufferPartial, chunks * R + 1) : nullptr;
  if (!logits || (softmax_sums && !partial)) return SPARSE_FFN_NO_MEMORY;
  const bool scored = p.dtype == SPARSE_FFN_FP32 ? score<float>(p, r, logits) : score<bf16>(p, r, logits);
  if (!scored) return SPARSE_FFN_NO_MEMORY;
  const int64_t padded = round_up(R, VL);
  int failed = 0;
#pragma omp parallel num_threads(team(chunks, p.n_threads))
  {
    const Candidates candidates = Candidates::reserve(R);
    float* row = scratch_of<float>(kBufferC, 2 * padded + R);
    float* probability = row + padded;
    int32_t* best = reinterpret_cast<int32_t*>(row + 2 * padded);
    const bool ready = candidates.ready() && row;
    if (!ready) {
#pragma omp atomic write
      failed = 1;
    }
#pragma omp for schedule(static)
    for (int64_t c = 0; c < chunks; c++) {
      if (!ready) continue;
      const int64_t first = c / per_group * length + c % per_group * kChunk;
      const int64_t last = lesser(first + kChunk, (c / per_group + 1) * length);
      float* sums = partial ? partial + c * R : nullptr;
      if (sums) memset(sums, 0, static_cast<size_t>(R) * 4);
      for (int64_t t = first; t < last; t++) {
        const float* scores = logits + t * R;
        for (int64_t i = R; i < padded; i++) row[i] = -__builtin_inff();
        for (int64_t i = 0; i < R; i += VL) {
          const V score = load_upto(scores + i, R - i);
          store_upto(row + i, r.bias ? score + load_upto(r.bias + i, R - i) : score, R - i);
        }
        if (p.K > kStruckOut || !select_short(row, R, p.K, index + t * p.K)) {
          select_row(row, R, p.K, candidates, best);
          for (int64_t j = 0; j < p.K; j++) index[t * p.K + j] = best[j];
        }
        gates(p, r, scores, index + t * p.K, probability, gate + t * p.K);
        if (!sums || (r.mask && !r.mask[t])) continue;
        if (r.gate_function != SPARSE_FFN_GATE_SOFTMAX) softmax(scores, R, probability);
        for (int64_t i = 0; i < R; i += VL)
          store_upto(sums + i, load_upto(sums + i, R - i) + load_upto(probability + i, R - i), R - i);
      }
    }
  }
  if (failed) return SPARSE_FFN_NO_MEMORY;
  if (softmax_sums) {
    memset(softmax_sums, 0, static_cast<size_t>(groups * R) * 4);
    for (int64_t c = 0; c < chunks; c++)
      for (int64_t i = 0; i < R; i++) softmax_sums[c / per_group * R + i] += partial[c * R + i];
  }
  return SPARSE_FFN_OK;
}

// Gradient of one token's scores. u: what reaches the softmax over all rows, [R]; p: scratch of R.
static void score_gradient_row(const sparse_ffn_experts& e, const RouterGradient& g, const float* logits, int64_t t,
                               const float* dgate, const float* dsums, float* p, float* u, float* out) {
  const int64_t R = g.router->rows;
  const int64_t* index = g.index + t * e.K;
  const float* gate = e.gate + t * e.K;
  const bool counts = dsums && !(g.router->mask && !g.router->mask[t]);
  const bool over_all = g.router->gate_function == SPARSE_FFN_GATE_SOFTMAX;
  if (counts || over_all) {
    softmax(logits, R, p);
    for (int64_t i = 0; i < R; i++) u[i] = counts ? dsums[i] : 0.f;
    if (over_all)
      for (int64_t j = 0; j < e.K; j++) u[index[j]] += dgate[j];
    V dot = zero();
    for (int64_t i = 0; i < R; i += VL) dot = fma(load_upto(p + i, R - i), load_upto(u + i, R - i), dot);
    const V mean = splat(sum(dot));
    for (int64_t i = 0; i < R; i += VL)
      store_upto(out + i, load_upto(p + i, R - i) * (load_upto(u + i, R - i) - mean), R - i);
  } else {
    memset(out, 0, static_cast<size_t>(R) * 4);
  }
  float mean = 0;
  switch (g.router->gate_function) {
    case SPARSE_FFN_GATE_SIGMOID:
      for (int64_t j = 0; j < e.K; j++) out[index[j]] += dgate[j] * gate[j] * (1.f - gate[j]);
      return;
    case SPARSE_FFN_GATE_SOFTMAX: return;  // over_all
    case SPARSE_FFN_GATE_SOFTMAX_TOPK:
      for (int64_t j = 0; j < e.K; j++) mean += gate[j] * dgate[j];
      for (int64_t j = 0; j < e.K; j++) out[index[j]] += gate[j] * (dgate[j] - mean);
      return;
    case SPARSE_FFN_GATE_UNWEIGHTED:
      for (int64_t j = 0; j < e.K; j++) out[index[j]] += 0.f * dgate[j];
  }
}

template <class T>
const T* score_gradient(const sparse_ffn_experts& p, const RouterGradient& g, const float* dgate) {
  const int64_t R = g.router->rows;
  const bool rescore = g.dsums || g.router->gate_function == SPARSE_FFN_GATE_SOFTMAX;
  float* logits = rescore ? scratch_of<float>(kBufferLogits, p.T * R + 1) : nullptr;
  T* out = scratch_of<T>(kBufferDlogits, p.T * R + 1);
  if ((rescore && !logits) || !out) return nullptr;
  if (rescore && !score<T>(p, *g.router, logits)) return nullptr;
  const int64_t length = p.T / g.router->groups;
  const int64_t padded = round_up(R, VL);
  int failed = 0;
#pragma omp parallel num_threads(team(ceil_div(p.T, kChunk), p.n_threads))
  {
    float* row = scratch_of<float>(kBufferC, 3 * padded + p.K);
    if (!row) {
#pragma omp atomic write
      failed = 1;
    }
#pragma omp for schedule(static)
    for (int64_t t = 0; t < p.T; t++) {
      if (!row) continue;
      float* total = row + 3 * padded;  // what reaches this token's gates
      for (int64_t j = 0; j < p.K; j++) total[j] = dgate[t * p.K + j] + (g.dgate ? g.dgate[t * p.K + j] : 0.f);
      score_gradient_row(p, g, rescore ? logits + t * R : nullptr, t, total,
                         g.dsums ? g.dsums + t / length * R : nullptr, row, row + padded, row + 2 * padded);
      for (int64_t i = 0; i < R; i += VL) store_upto(out + t * R + i, load(row + 2 * padded + i), R - i);
    }
  }
  return failed ? nullptr : out;
}
template const float* score_gradient<float>(const sparse_ffn_experts&, const RouterGradient&, const float*);
template const bf16* score_gradient<bf16>(const sparse_ffn_experts&, const RouterGradient&, const float*);
template const fp16* score_gradient<fp16>(const sparse_ffn_experts&, const RouterGradient&, const float*);
#if defined(SPARSE_FFN_AMX)
template const tiled_fp16* score_gradient<tiled_fp16>(const sparse_ffn_experts&, const RouterGradient&, const float*);
#endif

SPARSE_FFN_END
