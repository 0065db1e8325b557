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

// What a parallel region with so many pieces of work asks for: all threads, or one. libgomp ends the threads that a smaller
// team of several leaves over, with their scratch, and starts new ones for the next region.
static ALWAYS_INLINE int team(int64_t pieces, int n_threads) { return pieces > 1 ? larger(1, n_threads) : 1; }

SPARSE_FFN_END
