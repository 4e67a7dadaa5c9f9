#include "driver.h"

namespace vot {
namespace VOT_ISA {
namespace {

template <class T>
void check(Random& random, const Parallel& parallel) {
  const int64_t numbers = random.chance(0.1) ? 0 : random.whole(1, random.chance(0.2) ? 40000 : 300);
  const int count = int(random.whole(1, 5));
  std::vector<std::vector<T>> states, d_states(count, std::vector<T>(numbers));
  std::vector<const void*> ins;
  std::vector<void*> outs;
  for (int s = 0; s < count; s++) states.push_back(random.normals<T>(numbers));
  for (int s = 0; s < count; s++) ins.push_back(states[s].data()), outs.push_back(d_states[s].data());
  const std::vector<float> weights = random.normals<float>(count);
  const std::vector<T> d_out = random.normals<T>(numbers);
  std::vector<T> out(numbers);
  std::vector<float> d_weights(count, NAN);

  kernels.dense_residual_forward({DTYPE<T>, numbers, count, ins.data(), weights.data(), out.data()}, parallel);
  kernels.dense_residual_backward({DTYPE<T>, numbers, count, ins.data(), weights.data(), d_out.data(), outs.data(),
                                   d_weights.data()},
                                  parallel);
  for (int64_t i = 0; i < numbers; i++) {
    double expected = 0;
    for (int s = 0; s < count; s++) expected += double(weights[s]) * to_float(states[s][i]);
    expect_close("out", to_float(out[i]), expected, tolerance<T>(10));
    for (int s = 0; s < count; s++)
      expect_close("d_state", to_float(d_states[s][i]), double(weights[s]) * to_float(d_out[i]), tolerance<T>(10));
  }
  for (int s = 0; s < count; s++) {
    double expected = 0;
    for (int64_t i = 0; i < numbers; i++) expected += double(to_float(states[s][i])) * to_float(d_out[i]);
    expect_close("d_weight", d_weights[s], expected, 1e-5 * std::sqrt(numbers + 1.0));
  }
}

Registered registered("dense_residual", [](Random& random, const Parallel& parallel) {
  for_each_type([&](auto zero) { check<decltype(zero)>(random, parallel); });
});

}  // namespace
}  // namespace VOT_ISA
}  // namespace vot
