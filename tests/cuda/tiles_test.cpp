// The scheduling of csrc/cuda/tiles.h against what it promises, over random routings. Exits with 0 if all of it holds.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../../csrc/cuda/tiles.h"

using namespace sparse_ffn_cuda;

static void require(bool holds, const char* what) {
  if (holds) return;
  fprintf(stderr, "not so: %s\n", what);
  exit(1);
}

static void check(const std::vector<int64_t>& counts) {
  const int64_t E = static_cast<int64_t>(counts.size());
  std::vector<int32_t> offsets(1, 0);
  for (int64_t c : counts) offsets.push_back(static_cast<int32_t>(offsets.back() + c));
  const int64_t S = offsets.back();

  // every row lies in exactly one tile, which is its own expert's; tiles come in the order of the rows
  int64_t next = 0;
  for (int64_t t = 0; t < row_tiles(S, E); t++) {
    const Range r = row_tile(t, offsets.data(), E);
    require(r.expert >= 0 && r.expert < E, "a tile has an expert");
    if (r.begin >= r.end) continue;
    require(r.begin == next, "tiles follow one another without gap");
    require(r.begin >= offsets[r.expert] && r.end <= offsets[r.expert + 1], "a tile stays within its expert");
    require(r.end - r.begin <= kRows, "a tile is not too tall");
    next = r.end;
  }
  require(next == S, "tiles reach the last row");
}

int main() {
  std::mt19937 random(0);
  for (int round = 0; round < 2000; round++) {
    std::vector<int64_t> counts(1 + random() % 40);
    const uint32_t kind = random() % 4, most = 1 + random() % 400;
    for (auto& c : counts) c = kind == 0 || random() % 3 ? random() % most : 0;
    if (kind == 1) counts.assign(counts.size(), 0);
    if (kind == 2) counts[random() % counts.size()] = 2000;
    check(counts);
  }
  check({0x7fffffff});  // the most that offsets can say
  check({0x40000000, 0, 0x3ffffffe, 1});
  for (int64_t tile : {int64_t{0}, (int64_t{1} << 31) / kRows + 2})
    require(tile <= row_tiles(0x7fffffff, 3), "numbers of tiles do not overflow");
  puts("ok");
}
