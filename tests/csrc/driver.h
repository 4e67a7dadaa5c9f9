// Kernels on random problems, without torch, so that sanitizers see nothing else. Each op has a file of checks.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/kernels/list.h"
#include "../../csrc/kernels/simd.h"

namespace vot {
namespace VOT_ISA {

extern const Kernels kernels;

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  // From low to high, both included.
  int64_t whole(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(engine_); }
  bool chance(double share) { return std::uniform_real_distribution<>(0, 1)(engine_) < share; }
  float normal() { return std::normal_distribution<float>()(engine_); }
  template <class T>
  std::vector<T> normals(int64_t count) {
    std::vector<T> numbers(count);
    for (T& x : numbers) put(&x, normal());
    return numbers;
  }

 private:
  std::mt19937_64 engine_;
};

template <class T>
constexpr Dtype DTYPE = Dtype::FLOAT;
template <>
constexpr Dtype DTYPE<bf16> = Dtype::BF16;
template <>
constexpr Dtype DTYPE<f16> = Dtype::F16;

// body(T{}) for each type that kernels compute on.
template <class Body>
void for_each_type(const Body& body) {
  body(float{});
  body(bf16{});
  body(f16{});
}

// Rounding errors of a result of type T, whose terms have about the size `scale`.
template <class T>
double tolerance(double scale) {
  return scale * (DTYPE<T> == Dtype::FLOAT ? 1e-5 : DTYPE<T> == Dtype::BF16 ? 1e-2 : 2e-3);
}

inline void expect_close(const char* what, double found, double expected, double tolerance) {
  if (std::fabs(found - expected) <= tolerance) return;
  std::fprintf(stderr, "%s: %g, expected %g +- %g\n", what, found, expected, tolerance);
  std::exit(1);
}

// A sum in float64, and the same sum of absolute values, to which rounding errors are in proportion.
struct Sum {
  double value = 0, size = 0;
  void add(double term) { add({term, std::fabs(term)}); }
  void add(const Sum& part) { value += part.value, size += part.size; }
};

template <class T>
void expect_sum(const char* what, double found, const Sum& expected) {
  expect_close(what, found, expected.value, tolerance<T>(1 + expected.size));
}

// A check that the driver calls with many seeds: `static Registered check("dense_residual", dense_residual);`
struct Registered {
  using Check = void (*)(Random&, const Parallel&);
  Registered(const char* name, Check check);
};

}  // namespace VOT_ISA
}  // namespace vot
