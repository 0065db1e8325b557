// large_memory.h - memory for large outputs, kept for the next ones when they are freed. Not compiled per instruction set.
#pragma once
#include <cstddef>

namespace sparse_ffn {

constexpr size_t kMostKept = size_t{256} << 20;  // bytes: of freed outputs, and of what a thread's calls share with workers

// At least `bytes` bytes that start at a huge page, mapped. Null when there are none. Any thread may free what another took.
void* take_memory(size_t bytes);
// `bytes` as they were asked for.
void free_memory(void* memory, size_t bytes);
// Gives everything that is kept back to the system: called where there is no other memory left.
void release_memory();

}  // namespace sparse_ffn
