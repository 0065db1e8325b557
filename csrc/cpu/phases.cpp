// phases.cpp - see phases.h. Compiled only where phases are timed.
#include "phases.h"

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <utility>
#include <vector>

namespace sparse_ffn {
namespace {

struct Record {
  std::mutex mutex;
  std::vector<std::pair<const char*, double>> lines;
  ~Record() {
    const char* path = getenv("SPARSE_FFN_PHASES");
    FILE* file = path ? fopen(path, "w") : nullptr;
    if (!file) return;
    for (const auto& [name, seconds] : lines) fprintf(file, "%s %.9f\n", name, seconds);
    fclose(file);
  }
};
Record record;

}  // namespace

void record_phase(const char* name, double seconds) {
  const std::lock_guard<std::mutex> lock(record.mutex);
  record.lines.emplace_back(name, seconds);
}

}  // namespace sparse_ffn
