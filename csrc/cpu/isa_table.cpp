// isa_table.cpp - collects the kernels of one instruction set.
#include "ops.h"

#define STRINGIFY_(x) #x
#define STRINGIFY(x) STRINGIFY_(x)

SPARSE_FFN_BEGIN

extern const KernelTable table;
#define SPARSE_FFN_NAME(kernel, parameters) , kernel
const KernelTable table = {STRINGIFY(SPARSE_FFN_ISA_NAME) SPARSE_FFN_KERNELS(SPARSE_FFN_NAME)};
#undef SPARSE_FFN_NAME

SPARSE_FFN_END
