// quantized.cpp - products with rows of codes: for experts with many slots their numbers are made and packed as any weights
// are, here; for few slots see quantized_few.cpp.
#include "quantized.h"

#include "gemm_scatter.h"
#include "ops.h"
#include "slot_rows.h"

SPARSE_FFN_BEGIN

// Up to so many slots of a touched expert, on average, its numbers are made in registers, again for every four of them.
template <class T> constexpr int64_t kFewSlots = kDirectProduct<T> == Product::kPaired ? 20 : 8;
// From so many on the rows of x that slots name are packed once, and the weights' numbers are made once for all of them.
constexpr int64_t kManySlots = 40;

template <class T> struct Source {
  CodeRows<T> rows;
  bool down;
};

// Columns n0 .. n0+columns-1 of W[e]: of all rows down, [G, columns], and up that many whole rows,
// [columns, C].
template <class T, int kBits>
static void fill(const void* source, int64_t e, int64_t n0, int64_t columns, T* to) {
  const Source<T>& s = *static_cast<const Source<T>*>(source);
  const CodeRows<T>& rows = s.rows;
  const int64_t first = s.down ? n0 : 0, last = s.down ? n0 + columns : rows.c.columns;
  const int64_t begin = s.down ? 0 : n0, end = s.down ? rows.c.rows : n0 + columns;
  for (int64_t g = begin; g < end; g++, to += last - first) rows.template numbers<kBits>(e, g, first, last, to);
}

// Up, where each slot has an output row: by rows of x, so that an expert's numbers are made once, however many its slots.
template <class T, int kBits> static bool packed_up(const sparse_ffn_quantized& q, T* out) {
  const sparse_ffn_cvmm& p = q.cvmm;
  const Source<T> source{{q.codes}, false};
  RowGemm<T> g{};
  g.a = static_cast<const T*>(p.x);
  g.a_stride = p.x_stride;
  g.gather = p.gather;
  g.K = p.M;
  g.fill = fill<T, kBits>;
  g.source = &source;
  g.N = p.L;
  g.offsets = p.offsets;
  g.E = p.E;
  g.n_threads = p.n_threads;
  return run_slot_rows(p, g, out);
}

template <class T, int kBits> static bool packed(const sparse_ffn_quantized& q, bool many, T* out) {
  const sparse_ffn_cvmm& p = q.cvmm;
  if (!q.down && many && one_slot_each(p)) return packed_up<T, kBits>(q, out);
  const Source<T> source{{q.codes}, q.down};
  ScatterGemm<T> g{};
  g.a = static_cast<const T*>(p.x);
  g.a_stride = p.x_stride;
  g.gather = p.gather;
  g.K = p.M;
  g.fill = fill<T, kBits>;
  g.source = &source;
  g.w_stride_k = q.down ? p.L : 1;
  g.w_stride_n = q.down ? 1 : larger<int64_t>(2, p.M);
  g.N = p.L;
  g.offsets = p.offsets;
  g.E = p.E;
  g.scatter = p.scatter;
  g.scale = p.scale;
  g.out = out;
  g.out_stride = p.L;
  g.rows_out = p.rows_out;
  g.n_threads = p.n_threads;
  return run_scatter_gemm(g);
}

// Few slots are not packed, so that tiles do not multiply them.
template <class T> struct Unpacked { using Type = T; };
#if defined(SPARSE_FFN_AMX)
template <> struct Unpacked<tiled_fp16> { using Type = fp16; };
#endif

template <class T, int kBits> static int product(const sparse_ffn_quantized& q, T* out) {
  const sparse_ffn_cvmm& p = q.cvmm;
  if (!p.M || !q.codes.columns || !q.codes.rows) {
    memset(out, 0, static_cast<size_t>(p.rows_out * p.L) * sizeof(T));
    return SPARSE_FFN_OK;
  }
  int64_t touched = 0;
  for (int64_t e = 0; e < p.E; e++) touched += p.offsets[e] < p.offsets[e + 1];
  const int64_t slots = p.offsets[p.E];
  const bool done = slots <= kFewSlots<T> * touched ? quantized_few<typename Unpacked<T>::Type, kBits>(q, out)
                                                    : packed<T, kBits>(q, slots > kManySlots * touched, out);
  return done ? SPARSE_FFN_OK : SPARSE_FFN_NO_MEMORY;
}

int quantized_cvmm(const sparse_ffn_quantized& q, void* out) {
  return with_packed_dtype(q.cvmm.dtype, [&](auto example) {
    using T = decltype(example);
    return q.codes.bits == 4 ? product<T, 4>(q, static_cast<T*>(out)) : product<T, 8>(q, static_cast<T*>(out));
  });
}

SPARSE_FFN_END
