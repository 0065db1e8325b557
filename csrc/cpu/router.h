// router.h - routing fused with the expert FFN: the gradient of scores, gates and the sums that balance losses need. The
// scores [T, R], R rows of the router, live in scratch only: the backward pass computes them again.
#pragma once
#include "experts.h"

SPARSE_FFN_BEGIN

// What the backward pass of the experts adds for a router that reads the same x.
struct RouterGradient {
  const sparse_ffn_router* router;
  const int64_t* index;       // [T, K]
  const float* dgate;         // [T, K], what reached the gates from outside the experts; may be null
  const float* dsums;         // [groups, R], gradient of softmax_sums; may be null
  void* dweight;              // [R, D]; may be null
};

// Gradient of the scores, [T, R] in the storage type, from the experts' gate gradient [T, K]; null when out of memory.
template <class T> const T* score_gradient(const sparse_ffn_experts&, const RouterGradient&, const float* dgate);

SPARSE_FFN_END
