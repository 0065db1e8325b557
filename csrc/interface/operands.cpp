// operands.cpp - see operands.h.
#include "operands.h"

#include <cinttypes>
#include <cstdarg>
#include <cstdio>
#include <cstring>

namespace sparse_ffn {
namespace {

thread_local char error[400];

const char* const kDtypes[] = {"absent", "float32", "bfloat16", "float16", "int64", "int32", "bool",
                               "int8", "uint8", "another dtype or device"};
const char* dtype_name(int64_t dtype) {
  const bool known = dtype >= SPARSE_FFN_ABSENT && dtype < SPARSE_FFN_FOREIGN;
  return kDtypes[known ? dtype : int64_t{SPARSE_FFN_FOREIGN}];
}

// Sizes as text, "[3, 4]"; a letter for one that is not known.
class Shape {
 public:
  void add(int64_t size, char letter = '?') {
    const char* comma = length_ > 1 ? ", " : "";
    length_ += size < 0 ? snprintf(text_ + length_, sizeof text_ - length_, "%s%c", comma, letter)
                        : snprintf(text_ + length_, sizeof text_ - length_, "%s%" PRId64, comma, size);
  }
  const char* text() {
    snprintf(text_ + length_, sizeof text_ - length_, "]");
    return text_;
  }

 private:
  char text_[4 * 22 + 3] = "[";
  size_t length_ = 1;
};

bool is_dense(const sparse_ffn_tensor& t) {
  int64_t step = 1;
  for (int64_t d = t.dims - 1; d >= 0; step *= t.size[d--])
    if (t.size[d] > 1 && t.stride[d] != step) return false;
  return true;
}

bool is_permuted(const sparse_ffn_tensor& t) {
  int64_t step = 1, count = 1;
  for (int64_t d = 0; d < t.dims; d++) count *= t.size[d];
  while (step < count) {
    int64_t d = 0;
    while (d < t.dims && !(t.size[d] > 1 && t.stride[d] == step)) d++;
    if (d == t.dims) return false;
    step *= t.size[d];
  }
  return true;
}

// Whether an int64 can count the bytes from the first element to the last, whatever their size.
bool within_reach(const sparse_ffn_tensor& t) {
  int64_t elements = 1, step, bytes;
  for (int64_t d = 0; d < t.dims; d++)
    if (t.size[d] > 1 && (t.stride[d] < 0 || __builtin_mul_overflow(t.size[d] - 1, t.stride[d], &step) ||
                          __builtin_add_overflow(elements, step, &elements)))
      return false;
  return !__builtin_mul_overflow(elements, int64_t{8}, &bytes);
}

bool has(const sparse_ffn_tensor& t, Strides strides) {
  switch (strides) {
    case Strides::kDense: return is_dense(t);
    case Strides::kRows: return t.size[t.dims - 1] == 1 || t.stride[t.dims - 1] == 1;
    case Strides::kPermuted: return is_permuted(t);
    case Strides::kAny: return true;
  }
  return false;
}

}  // namespace

const char* last_error() { return error; }

int refuse(int status, const char* sentence, ...) {
  va_list values;
  va_start(values, sentence);
  vsnprintf(error, sizeof error, sentence, values);
  va_end(values);
  return status;
}

Operands::Operands() { memset(size_, 0xff, sizeof size_); }  // -1: not known

void Operands::refuse_sizes(const char* name, const sparse_ffn_tensor& t, const char* letters) {
  Shape wanted, got;
  for (; *letters; letters++) wanted.add((*this)[*letters], *letters);
  for (int64_t d = 0; d < t.dims && d < 4; d++) got.add(t.size[d]);
  status_ = refuse(SPARSE_FFN_BAD_ARGUMENT, "%s must have shape %s, got %s", name, wanted.text(), got.text());
}

void* Operands::check(const char* name, const sparse_ffn_tensor& t, const char* letters, int32_t dtype,
                      Strides strides) {
  static char nothing[64];
  if (status_) return nullptr;
  require(t.dtype != SPARSE_FFN_ABSENT, "%s is missing", name);
  if (status_) return nullptr;
  const int32_t wanted = dtype ? dtype : dtype_;
  if (wanted ? t.dtype != wanted : t.dtype < SPARSE_FFN_FP32 || t.dtype > SPARSE_FFN_FP16) {
    status_ = refuse(SPARSE_FFN_BAD_DTYPE, "%s must be %s on the CPU, got %s", name,
                     wanted ? dtype_name(wanted) : "float32, bfloat16 or float16", dtype_name(t.dtype));
    return nullptr;
  }
  const int64_t dims = static_cast<int64_t>(strlen(letters));
  bool fits = t.dims == dims;
  int64_t count = 1;
  for (int64_t d = 0; fits && d < dims; d++) {
    const int64_t size = (*this)[letters[d]];
    fits = t.size[d] >= 0 && (size < 0 || size == t.size[d]) && !__builtin_mul_overflow(count, t.size[d], &count);
  }
  if (!fits) {
    refuse_sizes(name, t, letters);
    return nullptr;
  }
  for (int64_t d = 0; d < dims; d++) let(letters[d], t.size[d]);
  if (!dtype) dtype_ = static_cast<int32_t>(t.dtype);
  if (!count) return nothing;
  require(t.data, "%s has no memory", name);
  require(within_reach(t) && has(t, strides), "%s has strides that do not fit: it must be %s", name,
          strides == Strides::kRows ? "contiguous in its last dimension" : "contiguous");
  return status_ ? nullptr : t.data;
}

void Operands::require(bool condition, const char* sentence, ...) {
  if (condition || status_) return;
  va_list values;
  va_start(values, sentence);
  vsnprintf(error, sizeof error, sentence, values);
  va_end(values);
  status_ = SPARSE_FFN_BAD_ARGUMENT;
}

void Operands::within(const char* name, const int64_t* index, int64_t n, int64_t limit, char bracket) {
  if (status_) return;
  const uint64_t end = static_cast<uint64_t>(limit) + (bracket == ']');
  bool inside = true;
  for (int64_t i = 0; i < n && inside; i++) inside = static_cast<uint64_t>(index[i]) < end;
  if (inside) return;
  int64_t low = index[0], high = index[0];
  for (int64_t i = 1; i < n; i++) {
    low = index[i] < low ? index[i] : low;
    high = index[i] > high ? index[i] : high;
  }
  status_ = refuse(SPARSE_FFN_BAD_INDEX, "%s must be in [0, %" PRId64 "%c, got values from %" PRId64 " to %" PRId64,
                   name, limit, bracket, low, high);
}

void Operands::count(const char* what, int64_t a, int64_t b) {
  if (status_ || b <= 0 || a <= kMost / b) return;
  const char* const most = "one call takes at most 2**31 - 1";
  status_ = b == 1 ? refuse(SPARSE_FFN_TOO_LARGE, "%s %s, got %" PRId64, most, what, a)
                   : refuse(SPARSE_FFN_TOO_LARGE, "%s %s, got %" PRId64 " times %" PRId64, most, what, a, b);
}

}  // namespace sparse_ffn
