#include "driver.h"

namespace vot {
namespace VOT_ISA {
namespace {

template <class T>
void check(Random& random, const Parallel& parallel) {
  const int64_t segments = random.whole(0, 5), width = random.whole(1, 90), slack = random.whole(0, 3);
  std::vector<int32_t> bounds = {0};
  for (int64_t s = 0; s < segments; s++)
    bounds.push_back(bounds.back() + (random.chance(0.3) ? 0 : int32_t(random.whole(1, 200))));
  const int64_t packed = bounds.back(), rows = packed + slack, stride = width + random.whole(0, 3);
  std::vector<T> x = random.normals<T>(rows * stride), out(rows * width);
  for (int64_t i = packed * stride; i < rows * stride; i++) put(&x[i], NAN);
  const std::vector<float> embedding = random.normals<float>(segments * width);

  kernels.segment_add_forward({DTYPE<T>, rows, segments, width, bounds.data(), x.data(), stride, embedding.data(),
                               out.data()},
                              parallel);
  std::vector<double> sums(segments * width);
  for (int64_t s = 0; s < segments; s++)
    for (int64_t row = bounds[s]; row < bounds[s + 1]; row++)
      for (int64_t i = 0; i < width; i++) {
        const double number = to_float(x[row * stride + i]);
        expect_close("out", to_float(out[row * width + i]), number + embedding[s * width + i], tolerance<T>(8));
        sums[s * width + i] += number;
      }
  for (int64_t i = packed * width; i < rows * width; i++) expect_close("slack", to_float(out[i]), 0, 0);

  std::vector<T> d_x(rows * width);
  std::vector<float> d_embedding(segments * width, NAN);
  kernels.segment_add_backward({DTYPE<T>, rows, segments, width, bounds.data(), x.data(), stride, d_x.data(),
                                d_embedding.data()},
                               parallel);
  for (int64_t row = 0; row < rows; row++)
    for (int64_t i = 0; i < width; i++)
      expect_close("d_x", to_float(d_x[row * width + i]), row < packed ? to_float(x[row * stride + i]) : 0, 0);
  for (int64_t i = 0; i < segments * width; i++) expect_close("d_embedding", d_embedding[i], sums[i], 1e-5);
}

Registered registered("segment_add", [](Random& random, const Parallel& parallel) {
  for_each_type([&](auto zero) { check<decltype(zero)>(random, parallel); });
});

}  // namespace
}  // namespace VOT_ISA
}  // namespace vot
