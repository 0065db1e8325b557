// large_memory.h - memory for large outputs, kept for the next ones when they are freed. Not compiled per instruction set.
#pragma once
#include <cstddef>

namespace sparse_ffn {

// At least `bytes` bytes that start at a huge page, mapped. Null when there are none. Any thread may free what another took.
void* take_memory(size_t bytes);
// `bytes` as they were asked for.
void free_memory(void* memory, size_t bytes);
// Gives everything that is kept back to the system.
void release_memory();

}  // namespace sparse_ffn
