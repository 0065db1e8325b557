// threads.h - OpenMP's threads, or without OpenMP the calling one alone.
#pragma once
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "types.h"

SPARSE_FFN_BEGIN

#if defined(_OPENMP)
static ALWAYS_INLINE int thread_index() { return omp_get_thread_num(); }
static ALWAYS_INLINE int thread_count() { return omp_get_num_threads(); }
#else
static ALWAYS_INLINE int thread_index() { return 0; }
static ALWAYS_INLINE int thread_count() { return 1; }
#endif

SPARSE_FFN_END
