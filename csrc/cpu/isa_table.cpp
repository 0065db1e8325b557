// isa_table.cpp - collects the kernels of one instruction set.
#include "ops.h"
#if defined(SPARSE_FFN_AMX)
#include "amx_check.h"
#endif

#define STRINGIFY_(x) #x
#define STRINGIFY(x) STRINGIFY_(x)

SPARSE_FFN_BEGIN

#if !defined(SPARSE_FFN_AMX)
static constexpr bool (*tiles_work)() = nullptr;
#endif

extern const KernelTable table;
#define SPARSE_FFN_NAME(kernel, parameters) , kernel
const KernelTable table = {STRINGIFY(SPARSE_FFN_ISA_NAME), tiles_work SPARSE_FFN_KERNELS(SPARSE_FFN_NAME)};
#undef SPARSE_FFN_NAME

SPARSE_FFN_END
