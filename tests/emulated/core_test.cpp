// core_test.cpp - the CPU core against plain loops in double, for instruction sets that only an emulator has: the products of
// few and of many rows in all three dtypes, forward and backward, the bag, the selections. Exits with the number of failures.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "sparse_ffn.h"

namespace {

int failures = 0;

float random_number() { return static_cast<float>(rand() % 2001 - 1000) / 1000.f; }

float widened(int64_t dtype, uint16_t bits) {
  float f;
  if (dtype == SPARSE_FFN_BF16) {
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    memcpy(&f, &word, 4);
    return f;
  }
  _Float16 half;
  memcpy(&half, &bits, 2);
  return static_cast<float>(half);
}
uint16_t narrowed(int64_t dtype, float f) {
  uint16_t bits;
  if (dtype == SPARSE_FFN_BF16) {
    uint32_t word;
    memcpy(&word, &f, 4);
    return static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16);
  }
  const _Float16 half = static_cast<_Float16>(f);
  memcpy(&bits, &half, 2);
  return bits;
}

// A matrix of random numbers, or of what the core shall overwrite.
struct Matrix {
  int64_t dtype;
  std::vector<int64_t> size;
  std::vector<char> memory;
  Matrix(int64_t dtype, std::vector<int64_t> size) : dtype(dtype), size(size) {
    memory.resize(static_cast<size_t>(count()) * width() + 64);
    for (int64_t i = 0; dtype <= SPARSE_FFN_FP16 && i < count(); i++) set(i, random_number());
  }
  int64_t count() const { int64_t n = 1; for (int64_t s : size) n *= s; return n; }
  size_t width() const { return dtype == SPARSE_FFN_INT64 ? 8 : dtype == SPARSE_FFN_BF16 || dtype == SPARSE_FFN_FP16 ? 2 : 4; }
  template <class T> T* as() { return reinterpret_cast<T*>(memory.data()); }
  double operator[](int64_t i) {
    return dtype == SPARSE_FFN_FP32 ? as<float>()[i] : static_cast<double>(widened(dtype, as<uint16_t>()[i]));
  }
  void set(int64_t i, float f) {
    if (dtype == SPARSE_FFN_FP32) as<float>()[i] = f; else as<uint16_t>()[i] = narrowed(dtype, f);
  }
  operator sparse_ffn_tensor() {
    sparse_ffn_tensor t{};
    t.dims = static_cast<int64_t>(size.size()), t.dtype = dtype, t.data = memory.data();
    int64_t step = 1;
    for (int64_t d = t.dims - 1; d >= 0; d--) t.size[d] = size[d], t.stride[d] = step, step *= size[d];
    return t;
  }
};

void same(const std::string& what, Matrix& got, const std::vector<double>& expected) {
  const double tolerance = got.dtype == SPARSE_FFN_FP32 ? 2e-5 : got.dtype == SPARSE_FFN_FP16 ? 5e-3 : 3e-2;
  double most = 1, error = 0;
  for (double e : expected) most = fmax(most, fabs(e));
  for (size_t i = 0; i < expected.size(); i++) {
    const double d = fabs(got[static_cast<int64_t>(i)] - expected[i]);
    error = d <= error ? error : d;  // a NaN counts
  }
  if (error <= tolerance * most) return;
  failures++;
  printf("%s: wrong by %g of %g\n", what.c_str(), error, most);
}

void fine(const std::string& what, int status) {
  if (!status) return;
  failures++;
  printf("%s: %s\n", what.c_str(), sparse_ffn_error());
}

void experts(int64_t dtype, int64_t T, int64_t D, int64_t E, int64_t G, int64_t O, int64_t K) {
  const std::string name = "experts of dtype " + std::to_string(dtype) + ", T=" + std::to_string(T) + " D=" + std::to_string(D) +
                           " G=" + std::to_string(G) + " O=" + std::to_string(O);
  const int64_t S = T * K;
  Matrix x(dtype, {T, D}), keys(dtype, {E, G, D}), values(dtype, {E, G, O}), gate(SPARSE_FFN_FP32, {T, K});
  Matrix index(SPARSE_FFN_INT64, {T, K}), out(dtype, {T, O}), dout(dtype, {T, O});
  for (int64_t s = 0; s < S; s++) index.as<int64_t>()[s] = rand() % E;
  Matrix order(SPARSE_FFN_INT32, {S}), offsets(SPARSE_FFN_INT32, {E + 1}), up(dtype, {S, G});
  sparse_ffn_experts_forward_args f{};
  f.units = {x, keys, values, {}, {}};
  f.index = index, f.gate = gate, f.out = out;
  fine(name, sparse_ffn_experts_forward(&f, SPARSE_FFN_RELU, 32, 1));  // inference: few tokens are not packed
  std::vector<double> y(T * O), dx(T * D), dkeys(E * G * D), dvalues(E * G * O), dgate(S);
  for (int64_t s = 0; s < S; s++) {
    const int64_t t = s / K, e = index.as<int64_t>()[s];
    for (int64_t g = 0; g < G; g++) {
      double h = 0, dh = 0;
      for (int64_t d = 0; d < D; d++) h += x[t * D + d] * keys[(e * G + g) * D + d];
      h = h > 0 ? h : 0;
      for (int64_t o = 0; o < O; o++) {
        const double v = values[(e * G + g) * O + o], upstream = dout[t * O + o];
        y[t * O + o] += gate[s] * h * v;
        dh += upstream * v;
        dvalues[(e * G + g) * O + o] += gate[s] * h * upstream;
      }
      dgate[s] += dh * h;
      for (int64_t d = 0; d < D && h > 0; d++) {
        dx[t * D + d] += gate[s] * dh * keys[(e * G + g) * D + d];
        dkeys[(e * G + g) * D + d] += gate[s] * dh * x[t * D + d];
      }
    }
  }
  same(name + ", inference", out, y);
  f.saved = {order, offsets, up, {}};
  fine(name, sparse_ffn_experts_forward(&f, SPARSE_FFN_RELU, 32, 1));
  same(name + ", forward", out, y);
  Matrix of_x(dtype, {T, D}), of_keys(dtype, {E, G, D}), of_values(dtype, {E, G, O}), of_gate(SPARSE_FFN_FP32, {T, K});
  sparse_ffn_experts_backward_args b{};
  b.units = f.units, b.gate = gate, b.saved = f.saved, b.dout = dout;
  b.dx = of_x, b.dkeys = of_keys, b.dvalues = of_values, b.dgate = of_gate;
  fine(name, sparse_ffn_experts_backward(&b, SPARSE_FFN_RELU, 1));
  same(name + ", dx", of_x, dx);
  same(name + ", dkeys", of_keys, dkeys);
  same(name + ", dvalues", of_values, dvalues);
  if (dtype == SPARSE_FFN_FP32) same(name + ", dgate", of_gate, dgate);  // h is rounded in the others
}

void bag(int64_t dtype, int64_t T, int64_t J, int64_t N, int64_t O) {
  const std::string name = "bag of dtype " + std::to_string(dtype) + ", O=" + std::to_string(O);
  Matrix values(dtype, {N, O}), index(SPARSE_FFN_INT64, {T, J}), weight(dtype, {T, J}), out(dtype, {T, O});
  std::vector<double> y(T * O);
  for (int64_t s = 0; s < T * J; s++) {
    const int64_t n = index.as<int64_t>()[s] = rand() % N;
    for (int64_t o = 0; o < O; o++) y[s / J * O + o] += weight[s] * values[n * O + o];
  }
  sparse_ffn_bag_forward_args f{};
  f.table = {values, index, weight}, f.out = out;
  fine(name, sparse_ffn_bag_forward(&f, 0, 1));
  same(name, out, y);
}

void units(int64_t dtype, int64_t T, int64_t F, int64_t k) {
  const std::string name = "units of dtype " + std::to_string(dtype) + ", F=" + std::to_string(F) + " k=" + std::to_string(k);
  Matrix up(dtype, {T, F}), hidden(dtype, {T, F}), index(SPARSE_FFN_INT64, {T, k});
  sparse_ffn_topk_hidden_forward_args f{};
  f.up = up, f.hidden = hidden, f.index = index;
  fine(name, sparse_ffn_topk_hidden_forward(&f, SPARSE_FFN_IDENTITY, static_cast<int32_t>(k), 1));
  std::vector<double> expected(T * F);
  for (int64_t t = 0; t < T; t++)
    for (int64_t i = 0, place = 0; i < F; i++) {
      int64_t before = 0;
      for (int64_t j = 0; j < F; j++) {
        const double a = fabs(up[t * F + i]), b = fabs(up[t * F + j]);
        before += b > a || (b == a && j < i);
      }
      if (before >= k) continue;
      expected[t * F + i] = up[t * F + i];
      if (index.as<int64_t>()[t * k + place++] != i) failures++, printf("%s: unit %d is missing\n", name.c_str(), int(i));
    }
  same(name, hidden, expected);
}

}  // namespace

int main(int, char** arguments) {
  printf("%s\n", sparse_ffn_isa());
  if (arguments[1] && strcmp(sparse_ffn_isa(), arguments[1])) failures++;
  for (int64_t dtype : {SPARSE_FFN_FP32, SPARSE_FFN_BF16, SPARSE_FFN_FP16}) {
    for (int64_t T : {1, 5, 13, 70})
      for (int64_t D : {3, 16, 37, 530})
        for (int64_t G : {1, 8, 35}) experts(dtype, T, D, 3, G, D == 37 ? 66 : 9, 2);
    for (int64_t O : {1, 31, 64, 200}) bag(dtype, 40, 7, 30, O);
    for (int64_t F : {1, 7, 64, 333})
      for (int64_t k : {int64_t{1}, (F + 1) / 2, F}) units(dtype, 6, F, k);
  }
  printf("%d failures\n", failures);
  return failures > 0;
}
