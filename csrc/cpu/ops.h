// ops.h - declares the kernels of one instruction set.
#pragma once
#include "kernel_table.h"
#include "types.h"

SPARSE_FFN_BEGIN

#define SPARSE_FFN_DECLARE(kernel, parameters) int kernel parameters;
SPARSE_FFN_KERNELS(SPARSE_FFN_DECLARE)
#undef SPARSE_FFN_DECLARE

SPARSE_FFN_END
