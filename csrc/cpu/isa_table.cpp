// isa_table.cpp - collects the entry points of one instruction set.
#include "kernel_table.h"

#include "experts.h"
#include "ops.h"
#include "router.h"

#define STRINGIFY_(x) #x
#define STRINGIFY(x) STRINGIFY_(x)

SPARSE_FFN_BEGIN

extern const KernelTable table;
const KernelTable table = {STRINGIFY(SPARSE_FFN_ISA_NAME),
                           experts_forward,
                           experts_decode,
                           experts_backward,
                           route_tokens,
                           moe_backward,
                           cvmm_forward,
                           cvmm_backward,
                           bag_forward,
                           bag_backward,
                           wide_product,
                           normalised_backward,
                           product_key_topk,
                           product_key_topk_backward,
                           topk,
                           topk_activation};

SPARSE_FFN_END
