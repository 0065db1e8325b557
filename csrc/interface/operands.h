// operands.h - the tensors of one call across the C interface, checked: each has the memory, dtype, sizes and strides that
// the kernels rely on. Not compiled per instruction set.
#pragma once
#include <cstdint>

#include "../include/sparse_ffn.h"

namespace sparse_ffn {

constexpr int64_t kMost = 0x7fffffff;

enum class Byte : uint8_t {};  // of a tensor of uint8: plain uint8_t stands for bool

enum class Strides {
  kDense,   // row-major
  kRows,    // 1 in the last dimension, any in the others
  kPermuted,  // row-major but for the order of the dimensions, without gaps
  kAny
};

// Takes the tensors of a call one after the other. Each dimension of a tensor is named by a letter. The first dimension of
// a letter says what size it stands for; all others must have that size. After the first tensor that does not fit all
// results are null, and status() is what to return. Before it only absent tensors are null: empty ones have an address.
class Operands {
 public:
  Operands();
  int status() const { return status_; }
  int64_t operator[](char letter) const { return size_[letter - 'A']; }
  void let(char letter, int64_t size) { size_[letter - 'A'] = size; }
  // The dtype of all tensors that are taken as void: that of the first.
  int32_t dtype() const { return dtype_; }

  template <class T>
  T* take(const char* name, const sparse_ffn_tensor& t, const char* letters, Strides strides = Strides::kDense) {
    return static_cast<T*>(check(name, t, letters, dtype_of(static_cast<const T*>(nullptr)), strides));
  }
  // One that may be absent.
  template <class T>
  T* maybe(const char* name, const sparse_ffn_tensor& t, const char* letters, Strides strides = Strides::kDense) {
    return t.dtype == SPARSE_FFN_ABSENT ? nullptr : take<T>(name, t, letters, strides);
  }

  // What letters do not say.
  void require(bool condition, const char* sentence, ...) __attribute__((format(printf, 3, 4)));
  // All n indices must lie in [0, limit).
  void below(const char* name, const int64_t* index, int64_t n, int64_t limit) { within(name, index, n, limit, ')'); }
  // All n indices must name one of E experts, or none with E.
  void experts(const char* name, const int64_t* index, int64_t n, int64_t E) { within(name, index, n, E, ']'); }
  // There may be 2^31-1 of what is named, a * b.
  void count(const char* what, int64_t a, int64_t b = 1);

 private:
  static int32_t dtype_of(const void*) { return SPARSE_FFN_ABSENT; }
  static int32_t dtype_of(const float*) { return SPARSE_FFN_FP32; }
  static int32_t dtype_of(const int64_t*) { return SPARSE_FFN_INT64; }
  static int32_t dtype_of(const int32_t*) { return SPARSE_FFN_INT32; }
  static int32_t dtype_of(const uint8_t*) { return SPARSE_FFN_BOOL; }
  static int32_t dtype_of(const int8_t*) { return SPARSE_FFN_INT8; }
  static int32_t dtype_of(const Byte*) { return SPARSE_FFN_UINT8; }

  void* check(const char* name, const sparse_ffn_tensor& t, const char* letters, int32_t dtype, Strides strides);
  void within(const char* name, const int64_t* index, int64_t n, int64_t limit, char bracket);
  void refuse_sizes(const char* name, const sparse_ffn_tensor& t, const char* letters);

  int status_ = SPARSE_FFN_OK;
  int32_t dtype_ = SPARSE_FFN_ABSENT;
  int64_t size_['Z' - 'A' + 1];
};

// What sparse_ffn_error() returns.
const char* last_error();
// Notes a sentence about a call that returns `status`, and returns it.
int refuse(int status, const char* sentence, ...) __attribute__((format(printf, 2, 3)));

}  // namespace sparse_ffn
