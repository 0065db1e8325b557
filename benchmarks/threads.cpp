// threads.cpp - the share of work of the slowest thread over the mean, for each pass of a SigmaMoE: benchmarks/threads.py.
// Arguments: T D E G k; the experts of all slots, then numbers of threads, come in on stdin, the latter until its end.
// Prints lines "pass ratio ratio ...", a ratio for each number of threads.
//
// The splits are the core's own (split.h); who takes the next piece is simulated. Work is counted in multiply-adds. Packing
// the weights counts as kPackingRows rows more, and reading them for a few rows as kReadingRows rows at least.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "../csrc/cpu/gemm_rows.h"

namespace sparse_ffn { void* scratch(Buffer, size_t) { return nullptr; } }

using namespace sparse_ffn::SPARSE_FFN_ISA_NAME;

namespace {

constexpr int64_t kReadingRows = 4;

struct Problem {
  int64_t T, D, E, G, k;
  std::vector<int32_t> offsets, token;  // slots sorted by expert
  const int32_t all[2] = {0, static_cast<int32_t>(T)};

  // Slots of expert e among tokens t0 .. t1-1.
  int64_t rows(int64_t e, int64_t t0, int64_t t1) const {
    const auto first = token.begin() + offsets[e], last = token.begin() + offsets[e + 1];
    return std::lower_bound(first, last, t1) - std::lower_bound(first, last, t0);
  }
};

using Work = std::vector<int64_t>;  // of each thread

// The pieces in their order, each to the thread that is done first.
struct Queue {
  Work work;
  explicit Queue(int64_t threads) : work(threads) {}
  void take(int64_t cost) { *std::min_element(work.begin(), work.end()) += cost; }
};

template <class T> Work by_rows(const int32_t* offsets, int64_t E, int64_t product, int64_t threads) {
  Work work(threads);
  const int64_t panels = count_panels<T>(offsets, E), n = std::max<int64_t>(1, std::min(threads, panels));
  for (int64_t t = 0; t < n; t++)
    share_panels<T>(offsets, E, panels, t, n, [&](int64_t e, int64_t first, int64_t last, int64_t count) {
      const int64_t all = offsets[e + 1] - offsets[e];
      const int64_t rows = panel_start<T>(all, last, count) - panel_start<T>(all, first, count);
      const bool packed = all >= kPackMinRows<T>;
      work[t] += (packed ? rows + kPackingRows : std::max(rows, (last - first) * kReadingRows)) * product;
    });
  return work;
}

Work by_token(const Problem& p, int64_t threads) {
  Queue queue(threads);
  const ScatterSplit s = split_scatter(p.T, p.D, p.offsets[p.E], p.E, true, threads);
  for (int64_t u = 0; u < s.pieces(); u++) {
    int64_t rows = 0;
    for (int64_t e = 0; e < p.E; e++)
      if (const int64_t found = p.rows(e, s.first_row(u), s.last_row(u))) rows += found + kPackingRows;
    queue.take(rows * p.G * (s.last_column(u) - s.first_column(u)));
  }
  return queue.work;
}

Work outer(const int32_t* offsets, int64_t E, int64_t M, int64_t N, int64_t threads) {
  Queue queue(threads);
  std::vector<int32_t> first(E + 1);
  int64_t most;
  const OuterSplit s = split_outer(N, offsets, E, threads, first.data(), &most);
  for (int64_t u = 0; u < s.pieces(); u++) {
    const int64_t e = s.expert(u), rows = offsets[e + 1] - offsets[e];
    queue.take(std::max<int64_t>(1, rows) * M * (s.last_column(u, e) - s.first_column(u, e)));
  }
  return queue.work;
}

// OpenMP's static schedule of n equal pieces.
Work evenly(int64_t n, int64_t threads) {
  Work work(threads);
  for (int64_t t = 0; t < threads; t++) work[t] = n / threads + (t < n % threads);
  return work;
}

Work decode(int64_t n, int64_t threads, int64_t (*first)(int64_t, int64_t, int64_t)) {
  Work work(threads);
  for (int64_t t = 0; t < threads; t++) work[t] = first(n, t + 1, threads) - first(n, t, threads);
  return work;
}

double balance(const Work& work) {
  int64_t total = 0, most = 0;
  for (int64_t w : work) total += w, most = std::max(most, w);
  return static_cast<double>(most) * static_cast<double>(work.size()) / static_cast<double>(total);
}

template <class T> void print(const Problem& p, const std::vector<int64_t>& counts) {
  const auto line = [&](const char* pass, const std::function<Work(int64_t)>& work) {
    printf("%s", pass);
    for (int64_t threads : counts) printf(" %.4f", balance(work(threads)));
    printf("\n");
  };
  line("route", [&](int64_t n) { return by_rows<T>(p.all, 1, p.D * p.E, n); });
  line("select", [&](int64_t n) { return evenly(ceil_div(p.T, 64), n); });
  line("up, dh", [&](int64_t n) { return by_rows<T>(p.offsets.data(), p.E, p.D * p.G, n); });
  line("down, dx", [&](int64_t n) { return by_token(p, n); });
  line("dscores", [&](int64_t n) { return evenly(p.T, n); });
  line("dkeys, dvalues", [&](int64_t n) { return outer(p.offsets.data(), p.E, p.G, p.D, n); });
  line("drouter", [&](int64_t n) { return outer(p.all, 1, p.E, p.D, n); });
  if (p.T > 32) return;
  line("decode up", [&](int64_t n) { return decode(p.G, n, first_unit); });
  line("decode down", [&](int64_t n) { return decode(p.D, n, first_column); });
}

}  // namespace

int main(int, char** argument) {
  const auto size = [&](int i) { return strtoll(argument[i], nullptr, 10); };
  Problem p{size(1), size(2), size(3), size(4), size(5), {}, {}};
  std::vector<std::vector<int32_t>> tokens(p.E);
  long long number;
  for (int64_t slot = 0; slot < p.T * p.k && scanf("%lld", &number) == 1; slot++)
    tokens[number].push_back(static_cast<int32_t>(slot / p.k));
  p.offsets.push_back(0);
  for (const auto& of_expert : tokens) {
    p.token.insert(p.token.end(), of_expert.begin(), of_expert.end());
    p.offsets.push_back(static_cast<int32_t>(p.token.size()));
  }
  std::vector<int64_t> counts;
  while (scanf("%lld", &number) == 1) counts.push_back(number);
  if (argument[6] == std::string("bf16")) print<bf16>(p, counts); else print<float>(p, counts);
}
