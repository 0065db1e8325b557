// tile.h - the micro-kernels: a tile of MR rows x NV vectors of the product A B, kept in registers over all of k.
//
// Packed operands are made of 32-bit words. Plain: one word is one fp32 k (bf16 and fp16 are widened while packing).
// Paired: one word is two neighbouring bf16 k, multiplied by vdpbf16ps. Which one bf16 uses is a matter of the CPU:
// on AMD Zen4 vdpbf16ps does twice the work of an fp32 FMA, on Intel Sapphire Rapids half of it (measured), so there
// are two AVX-512 builds and dispatch.cpp chooses. In the build for AMX packed bf16 words are pairs too, multiplied by
// matrix tiles and padded with zeros to whole tiles along k; rows that are too few to be packed are widened there. Where the
// tiles multiply fp16 too, its storage type is tiled_fp16.
#pragma once
#include "amx.h"
#include "vec.h"

SPARSE_FFN_BEGIN

// How packed operands of T are multiplied, and those that are not packed.
enum class Product { kPlain, kPaired, kTiles, kTilesFp16 };
template <class T> constexpr Product kPackedProduct = Product::kPlain;
template <class T> constexpr Product kDirectProduct = Product::kPlain;
#if defined(SPARSE_FFN_AMX)
template <> constexpr Product kPackedProduct<bf16> = Product::kTiles;
template <> constexpr Product kPackedProduct<tiled_fp16> = Product::kTilesFp16;
#elif defined(__AVX512BF16__)
template <> constexpr Product kPackedProduct<bf16> = Product::kPaired;
template <> constexpr Product kDirectProduct<bf16> = Product::kPaired;
#endif
constexpr bool on_tiles(Product product) { return product == Product::kTiles || product == Product::kTilesFp16; }
template <class T> constexpr bool kOnTiles = on_tiles(kPackedProduct<T>);

#if defined(__AVX512F__)
constexpr int kMr = 12;  // 12 x 2 accumulators + 2 of B + 1 broadcast = 27 of 32 registers
#elif defined(__AVX2__)
constexpr int kMr = 6;   // 6 x 2 + 2 + 1 = 15 of 16
#elif defined(__aarch64__)
constexpr int kMr = 12;  // 12 x 2 + 2 + 1 = 27 of 32
#else
constexpr int kMr = 4;
#endif
static_assert(kMr <= 12, "tile() has pointers to 12 rows, and tile_for() cases up to 12");
constexpr int kTilesMr = 2 * kTileSide;
template <class T> constexpr int kPanelRows = kOnTiles<T> ? kTilesMr : kMr;  // of a full packed panel of A
constexpr int kNr = 2 * VL;                // columns of a full packed panel of B
constexpr int64_t kKBlock = 512;           // words of k per pass, so that a packed panel of A stays near L1
constexpr int64_t kRowStride = kKBlock + 16;  // words between rows of packed A; not a power of two: cache sets

// Where a finished tile goes.
struct TileOut {
  float* c;             // first column of row 0
  int64_t stride;       // between rows
  const int32_t* rows;  // kScatter: row r goes to c + (rows[r] - first_row) * stride, times scale[r]
  const float* scale;
  int32_t first_row;
};
// kStream: kStore past the caches, for c and stride aligned to vectors.
enum class Finish { kStore, kAdd, kScatter, kStream };
// Word k of row r of A lies at
enum class Layout {
  kPacked,   // a[r * kRowStride + k]: packed by rows
  kRows,     // a[r * stride + k]: fp32 rows where they are
  kColumns,  // a[k * stride + r]: packed by columns, or fp32 columns where they are
  kTiles,    // a[(k / 16 * 2 + r / 16) * 256 + r % 16 * 16 + k % 16]: packed as the tiles of AMX
};

// One cache line is fetched into L2 per word of k, for whatever is needed next: gathered rows come from L3 or memory
// at addresses no hardware prefetcher can guess, and cost 10% of the time when they are waited for.
using Lines = const void* const*;
extern const void* const kNoLines[kKBlock * 2];

using TileFn = void (*)(int mr, int64_t k_words, const float* a, int64_t a_stride, const float* b, const TileOut&, Lines);
// The kernel for mr rows and a packed panel of B that is kNr columns wide, or one vector where that covers `columns`.
// On tiles it may read rows of A up to a multiple of 16, whatever they hold.
TileFn find_tile(Finish, Layout, Product, int mr, int64_t columns);

// In each thread that multiplies packed operands of T, around all of that: the tiles of AMX are configured meanwhile.
// Nothing is assumed about them before, and nothing is left in them for other libraries.
template <class T> struct TilesInUse {
#if defined(SPARSE_FFN_AMX)
  TilesInUse() { if constexpr (kOnTiles<T>) configure_tiles(TileConfig{}); }
  ~TilesInUse() { if constexpr (kOnTiles<T>) release_tiles(); }
#else
  TilesInUse() {}
#endif
  TilesInUse(const TilesInUse&) = delete;
};

// B read where it lies (row-major, of T), for experts with fewer than kPackMinRows rows, and for a few tokens
// (experts_decode.cpp): packing would not pay. Its k rows are rows[0], rows[1], ...; kListAhead more are fetched. A packed
// by rows (kDirectProduct), result scattered. Null where mr * nv accumulators do not fit.
constexpr int kListAhead = 14;
template <class T>
using DirectFn = void (*)(int64_t k, const float* a, const T* b, int64_t b_stride, const int32_t* rows, const TileOut&);
template <class T> DirectFn<T> find_direct(int mr, int nv);
extern template DirectFn<float> find_direct<float>(int, int);
extern template DirectFn<bf16> find_direct<bf16>(int, int);
extern template DirectFn<fp16> find_direct<fp16>(int, int);
#if defined(SPARSE_FFN_AMX)
extern template DirectFn<tiled_fp16> find_direct<tiled_fp16>(int, int);
#endif

SPARSE_FFN_END
