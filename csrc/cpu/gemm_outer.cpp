// gemm_outer.cpp - see gemm_outer.h.
#include "gemm_outer.h"

#include "split.h"

SPARSE_FFN_BEGIN

constexpr int64_t kGroup = 4 * kNr;      // columns of B packed at once: gathered rows are read in pieces of 512 bytes

// Rows per pass: a panel of B (32 KB) then stays in L1 while all of A passes by.
template <class T> constexpr int64_t kOuterRows = kOnTiles<T> ? 512 : 256;

// fp32, and bf16 from tiles, goes past the caches: a finished gradient is not read again here, and lines need not be read to
// be written.
template <class T> constexpr bool kStreams = sizeof(T) == 4 || kOnTiles<T>;
template <class T> static ALWAYS_INLINE bool aligned(const T* out, int64_t stride) {
  return (reinterpret_cast<uintptr_t>(out) | static_cast<uintptr_t>(stride) * sizeof(T)) % (4 * VL) == 0;
}
template <class T>
static ALWAYS_INLINE void store_rows(const float* c, int64_t c_stride, int64_t rows, int64_t n, T* out, int64_t stride) {
  constexpr int64_t kLine = 4 * VL / sizeof(T);
  const bool streams = kStreams<T> && aligned(out, stride);
  for (int64_t r = 0; r < rows; r++, c += c_stride, out += stride) {
    int64_t j = 0;
    for (; streams && j + kLine <= n; j += kLine) {
      if constexpr (sizeof(T) == 4) stream(out + j, load(c + j));
      else if constexpr (kStreams<T>) stream(out + j, load(c + j), load(c + j + VL));
    }
    for (; j < n; j += VL) store_upto(out + j, load(c + j), n - j);
  }
}

// Columns n0 .. n1-1 of one out of one expert. a: first column of A for this out.
template <class T>
static void outer_piece(const OuterGemm<T>& g, int64_t e, const T* a, T* out, int64_t n0, int64_t n1, float* pa,
                       float* pb, float* c, LineQueue* next) {
  const int64_t first = g.offsets[e], rows = g.offsets[e + 1] - first, columns = n1 - n0;
  const int64_t padded = round_up(columns, VL);
  out += e * g.M * g.N;
  if (!rows) {  // all at once, by the piece of the first columns
    if (!n0) memset(out, 0, static_cast<size_t>(g.M * g.N) * sizeof(T));
    return;
  }
  const bool one_pass = rows <= kOuterRows<T>;  // else the passes are summed in c [M, padded]
  const bool streams = kStreams<T> && aligned(out, g.N);
  // fp32 in expert order needs no packing: word k of row m is a[k * stride + m]. Whichever operand is packed is scaled
  // then, A if both are: it is the narrower one.
  const bool a_in_place = sizeof(T) == 4 && !g.gather_a;
  for (int64_t k0 = 0; k0 < rows; k0 += kOuterRows<T>) {
    const int64_t k = lesser(kOuterRows<T>, rows - k0), k_words = words<T>(k), s0 = first + k0;
    if (!a_in_place)
      for (int64_t m = 0; m < g.M; m += kPanelRows<T>) {
        const int64_t mr = lesser<int64_t>(kPanelRows<T>, g.M - m);
        const auto row = [&](int64_t i) { return a + (g.gather_a ? g.gather_a[s0 + i] : s0 + i) * g.a_stride + m; };
        const float* scale = g.scale ? g.scale + s0 : nullptr;
        if constexpr (kOnTiles<T>) pack_tiles(pa + m * k_words, row, k, mr, scale);
        else pack_columns<T>(pa + m * k_words, row, k, mr, mr, scale);
      }
    for (int64_t group = 0; group < padded; group += kGroup) {
      const auto row = [&](int64_t i, int64_t column) {
        return g.b + (g.gather_b ? g.gather_b[s0 + i] : s0 + i) * g.b_stride + n0 + column;
      };
      pack_group<T>(pb, [&](int64_t i) { return row(i, group); }, k, columns - group, lesser(kGroup, padded - group),
                    a_in_place && g.scale ? g.scale + s0 : nullptr);
      next->clear();
      if (!kOnTiles<T> && group + kGroup < padded)
        for (int64_t i = 0; i < k; i++)
          next->add(row(i, group + kGroup), lesser(kGroup, columns - group - kGroup) * static_cast<int64_t>(sizeof(T)));
      next->seal();
      for (int64_t j = group; j < lesser(padded, group + kGroup); j += kNr) {
        const int64_t width = lesser<int64_t>(kNr, padded - j), valid = lesser(width, columns - j);
        for (int64_t m = 0; m < g.M; m += kPanelRows<T>) {
          const int mr = static_cast<int>(lesser<int64_t>(kPanelRows<T>, g.M - m));
          const float* pm = a_in_place ? reinterpret_cast<const float*>(a + s0 * g.a_stride + m) : pa + m * k_words;
          T* target = out + m * g.N + n0 + j;
          TileOut tile{c + m * padded + j, padded, nullptr, nullptr, 0};
          Finish finish = k0 ? Finish::kAdd : Finish::kStore;
          if (sizeof(T) == 4 && one_pass && streams && valid == width) {
            tile.c = reinterpret_cast<float*>(target);
            tile.stride = g.N;
            finish = Finish::kStream;
          } else if (one_pass) {
            tile.c = c;
            tile.stride = width;
            for (int r = 0; r < mr && !(kOnTiles<T> && streams); r++)  // where it goes is in no cache: fetch it meanwhile
              for (int64_t i = 0; i <= valid; i += VL) prefetch(target + r * g.N + lesser(i, valid - 1));
          }
          const Layout layout = kOnTiles<T> ? Layout::kTiles : Layout::kColumns;
          find_tile(finish, layout, kPackedProduct<T>, mr, width)(mr, k_words, pm, a_in_place ? g.a_stride : mr,
                                                                  pb + (j - group) * k_words, tile, next->take(k_words));
          if (one_pass && finish != Finish::kStream) store_rows(c, width, mr, valid, target, g.N);
        }
      }
    }
  }
  if (!one_pass) store_rows(c, padded, g.M, columns, out + n0, g.N);
}

template <class T> bool run_outer_gemm(const OuterGemm<T>& g) {
  if (!g.E || !g.M || !g.N) return true;
  // A row of a tile is rounded when it has been scaled: h times a gate of 1e-5 would be lost, which no loss scale undoes.
  if constexpr (kPackedProduct<T> == Product::kTilesFp16)
    if (g.scale)
      return run_outer_gemm(OuterGemm<fp16>{g.a, g.a_stride, g.gather_a, g.M, g.b, g.b_stride, g.gather_b, g.N, g.scale,
                                            g.offsets, g.E, {g.out[0], g.out[1]}, g.n_threads});
  const int64_t threads = larger(1, g.n_threads);
  int32_t* first_piece = scratch_of<int32_t>(kBufferIndex, g.E + 1);
  if (!first_piece) return false;
  int64_t most_columns;
  const OuterSplit split = split_outer(g.N, g.offsets, g.E, threads, first_piece, &most_columns);
  int failed = 0;
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    const TilesInUse<T> tiles;
    float* pa = scratch_of<float>(kBufferA, round_up(g.M, kPanelRows<T>) * kOuterRows<T>);
    float* pb = scratch_of<float>(kBufferB, kGroup * kOuterRows<T>);
    float* c = scratch_of<float>(kBufferC, larger<int64_t>(g.M * most_columns, kPanelRows<T> * kNr));
    LineQueue next;
    const bool ready = next.reserve(kOuterRows<T> * (kGroup * static_cast<int64_t>(sizeof(T)) / 64 + 1)) && pa && pb && c;
    if (!ready) {
#pragma omp atomic write
      failed = 1;
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t u = 0; u < split.pieces(); u++) {
      if (!ready) continue;
      const int64_t e = split.expert(u), n0 = split.first_column(u, e), n1 = split.last_column(u, e);
      if (g.out[0]) outer_piece(g, e, g.a, g.out[0], n0, n1, pa, pb, c, &next);
      if (g.out[1]) outer_piece(g, e, g.a + g.M, g.out[1], n0, n1, pa, pb, c, &next);
      drain_streams();
    }
  }
  return !failed;
}

#define SPARSE_FFN_DEFINE(T) template bool run_outer_gemm(const OuterGemm<T>&);
SPARSE_FFN_DEFINE(float)
SPARSE_FFN_DEFINE(bf16)
SPARSE_FFN_DEFINE(fp16)
SPARSE_FFN_WITH_TILED(SPARSE_FFN_DEFINE)

SPARSE_FFN_END
