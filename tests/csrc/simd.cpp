#include <cstring>

#include "driver.h"

namespace vot {
namespace VOT_ISA {
namespace {

using Function = Vec (*)(Vec);

// Every lane holds its own number.
template <class Draw>
Vec filled(const Draw& draw) {
  Vec x;
  for (int i = 0; i < LANES; i++) x[i] = draw();
  return x;
}

void check_within(const char* what, Function fast, double (*exact)(double), Random& random, double low, double high,
                  double error) {
  const Vec x = filled([&] { return float(low + (high - low) * double(random.whole(0, 1 << 24)) / (1 << 24)); });
  const Vec y = fast(x);
  for (int i = 0; i < LANES; i++) expect_close(what, y[i] / exact(x[i]), 1, error);
}

void check_limits(const char* what, Function fast) {
  const Vec low = fast(splat(-INF)), unknown = fast(splat(NAN));
  for (int i = 0; i < LANES; i++) {
    expect_close(what, low[i], 0, 0);
    expect_close(what, std::isnan(unknown[i]), 1, 0);
  }
}

// The ends of rows hold what was in memory before; nobody reads what becomes of it, but it must not end the program.
void check_any_bits(Function fast, Random& random) {
  const Vec y = fast(filled([&] {
    const auto bits = uint32_t(random.whole(0, UINT32_MAX));
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }));
  volatile float sink = y[0];
  (void)sink;
}

Registered registered("simd", [](Random& random, const Parallel&) {
  const Function power = [](Vec x) { return exp2(x); }, exponential = [](Vec x) { return exp(x); };
  for (int i = 0; i < 100; i++) {
    check_within("exp2", power, std::exp2, random, -126, 127, 3e-7);
    check_within("exp", exponential, std::exp, random, -87, 70, 1.5e-7);
    check_any_bits(power, random);
    check_any_bits(exponential, random);
  }
  check_limits("exp2", power);
  check_limits("exp", exponential);
});

}  // namespace
}  // namespace VOT_ISA
}  // namespace vot
