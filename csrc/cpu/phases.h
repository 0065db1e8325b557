// phases.h - times the passes of an op, in builds with -DSPARSE_FFN_PHASES=ON only (`python -m benchmarks.passes` makes one).
// When the process ends, lines "name seconds" go to the file that SPARSE_FFN_PHASES names in the environment.
#pragma once
#if defined(SPARSE_FFN_PHASES)
#include <chrono>

namespace sparse_ffn {
void record_phase(const char* name, double seconds);
template <class Pass> auto phase(const char* name, const Pass& pass) {
  const auto start = std::chrono::steady_clock::now();
  const auto result = pass();
  record_phase(name, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  return result;
}
}  // namespace sparse_ffn
#define PHASE(name, ...) ::sparse_ffn::phase(name, [&] { return __VA_ARGS__; })
#else
#define PHASE(name, ...) (__VA_ARGS__)
#endif
