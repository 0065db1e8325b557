// problem.h - what the kernels are given: sizes, and raw pointers whose extents csrc/interface has checked. Tensors are dense
// and row-major unless a stride (in elements) is given; comments as in sparse_ffn.h.
#pragma once
#include "../include/sparse_ffn.h"

namespace sparse_ffn {

struct sparse_ffn_experts {
  int64_t T, D, O, E, G, K;
  int32_t dtype, n_threads;
  sparse_ffn_activation activation;
  const void* x;             // [T, D], row stride x_stride
  int64_t x_stride;
  const void* keys;          // [E, G, D]
  const void* gate_keys;     // [E, G, D] or null: no GLU
  const void* values;        // [E, G, O]
  const void* key_bias;      // [E, G] or null
  const float* gate;         // [T, K]
  const void* dropout_mask;  // [T, K, G] or null
  const int32_t* order;      // [S]: void slots lie behind all others and are never read
  const int32_t* offsets;    // [E+1]
};

struct sparse_ffn_router {
  int64_t rows;              // R, at least E: those from E on select no expert
  const void* weight;        // [R, D] in x's dtype
  const float* bias;         // [R] or null
  const uint8_t* mask;       // [T] or null
  int64_t groups;            // runs of T / groups tokens with sums of their own
  sparse_ffn_gate gate_function;
};

// Slots are sorted by expert: expert e owns offsets[e] .. offsets[e+1]-1, and void slots lie behind. One of w_stride_m,
// w_stride_l is 1.
struct sparse_ffn_cvmm {
  int64_t rows_x, rows_out, S, E, M, L;
  int32_t dtype, n_threads;
  const void* x;             // [rows_x, M], row stride x_stride
  int64_t x_stride;
  const void* w;             // [E, M, L]
  int64_t w_stride_e, w_stride_m, w_stride_l;
  const int32_t* offsets;    // [E+1]
  const int32_t* gather;     // [S], values in [0, rows_x)
  const int32_t* scatter;    // [S], values in [0, rows_out)
  const float* scale;        // [S]; null: one
};

struct sparse_ffn_row_strides {
  int64_t expert, row;       // in elements
};
// number = scale * (code - zero): see sparse_ffn.h. Rows have unit stride.
struct sparse_ffn_codes {
  int64_t rows, columns, groups;
  int bits;                  // 4: bytes of two codes; 8: int8
  const void* qdata;
  const void* scale;         // [.., groups] in x's dtype
  const void* zero_point;    // [.., groups] bytes, or null
  sparse_ffn_row_strides qdata_strides, scale_strides, zero_strides;
};
struct sparse_ffn_quantized {
  sparse_ffn_cvmm cvmm;      // without w
  sparse_ffn_codes codes;
  bool down;                 // W[e] is the rows, [rows, columns]; else their transpose
};
struct sparse_ffn_quantized_experts {
  sparse_ffn_experts experts;                // without keys, gate_keys, values and dropout_mask
  sparse_ffn_codes keys, gate_keys, values;  // gate_keys: qdata null without a GLU
};

struct sparse_ffn_bag {
  int64_t T, J, N, O;
  int32_t dtype, n_threads;
  const void* values;        // [N, O]
  const int64_t* index;      // [T, J]
  const void* weight;        // [T, J]
  bool skip_zeros;           // rows of weight zero need not be read
};

struct sparse_ffn_wide_product {
  int64_t B, M, N, K;
  int64_t norm_width;
  int32_t dtype, norm, n_threads;
  const void* x;             // [B, M, K]; row b, m is b * x_steps_b + m * x_steps_m steps of x_step elements on
  int64_t x_step, x_steps_b, x_steps_m;
  const void* w;             // [B, N, K]
};

// M rows of `pieces` pieces; dout piece at m * stride_m + piece * stride_piece.
struct sparse_ffn_normalised {
  int64_t M, pieces, width;
  int64_t stride_m, stride_piece;
  int32_t dtype, norm, n_threads;
};

struct sparse_ffn_topk_hidden {
  int64_t T, F, K;
  int32_t dtype, n_threads;
  sparse_ffn_activation activation;
  const void* up;            // [T, F]
  const void* glu_gate;      // [T, F] or null: no GLU
  const void* dropout_mask;  // [T, F] or null
  const float* norm;         // [F] or null
};
struct sparse_ffn_topk_hidden_out {  // null: not wanted
  int64_t* index;            // [T, K]
  void* kept;                // [T, K]
  void* hidden;              // [T, F]
  int32_t* selected;         // [T, ceil(F / 32)]
  void *up, *glu_gate;       // [T, K]
};
struct sparse_ffn_topk_kept {
  int64_t T, F, K;
  int32_t dtype, n_threads;
  sparse_ffn_activation activation;
  const int32_t* selected;   // [T, ceil(F / 32)]
  const void *up, *glu_gate; // [T, K]; null: no GLU
  const void* dropout_mask;  // [T, F] or null
};

// Row (t, h) has two tables of n scores, at scores + t * stride_t + h * stride_h (+ stride_s).
struct sparse_ffn_product_keys {
  int64_t T, H, n, k;
  int64_t stride_t, stride_h, stride_s;
  int32_t n_threads;
};

}  // namespace sparse_ffn
