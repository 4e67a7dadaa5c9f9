#include "driver.h"

namespace vot {
namespace VOT_ISA {
namespace {

struct Shape {
  int64_t tokens, packed, head_dim;
};

// Rows of heads with free space between heads and between tokens.
template <class T>
struct Matrix {
  int64_t heads;
  std::vector<T> numbers;
  Heads view;
  const T* head(int64_t token, int64_t h) const {
    return numbers.data() + token * view.token_stride + h * view.head_stride;
  }
};
template <class T>
Matrix<T> matrix(Random& random, const Shape& shape, int64_t heads) {
  const int64_t head_stride = shape.head_dim + random.whole(0, 2);
  const int64_t token_stride = heads * head_stride + random.whole(0, 2);
  Matrix<T> x = {heads, random.normals<T>(shape.tokens * token_stride), {}};
  x.view = {x.numbers.data(), token_stride, head_stride};
  for (int64_t i = shape.packed * token_stride; i < int64_t(x.numbers.size()); i++) put(&x.numbers[i], NAN);
  return x;
}

// Where a head lies whose gradient or result is [tokens, heads, head_dim] without gaps.
template <class T>
const T* head_of(const std::vector<T>& dense, const Shape& shape, int64_t heads, int64_t token, int64_t head) {
  return dense.data() + (token * heads + head) * shape.head_dim;
}

template <class T>
void check(Random& random, const Parallel& parallel) {
  const int64_t packed = random.whole(0, 40), half = random.whole(1, 45), d = 2 * half;
  const Shape shape = {packed + random.whole(0, 3), packed, d};
  const bool normed = random.chance(0.7);
  std::vector<float> positions, frequencies, weight;
  std::vector<int32_t> axes;
  for (int64_t i = 0; i < 3 * packed; i++) positions.push_back(float(random.whole(0, 50)));
  for (int64_t i = 0; i < half; i++) frequencies.push_back(std::fabs(random.normal())), axes.push_back(int32_t(i % 3));
  for (int64_t i = 0; i < d; i++) weight.push_back(1 + 0.3f * random.normal());
  const Matrix<T> x[2] = {matrix<T>(random, shape, random.whole(1, 3)), matrix<T>(random, shape, 1)};
  const Matrix<T> d_out[2] = {matrix<T>(random, shape, x[0].heads), matrix<T>(random, shape, 1)};
  std::vector<T> out[2], d_x[2];
  std::vector<float> d_weight[2];
  RopeQkNormForward forward = {
      DTYPE<T>, shape.tokens, packed, d, positions.data(), frequencies.data(), axes.data(), 1e-6f, {}};
  RopeQkNormBackward backward = {
      DTYPE<T>, shape.tokens, packed, d, positions.data(), frequencies.data(), axes.data(), 1e-6f, {}};
  const float* given = normed ? weight.data() : nullptr;
  for (int i = 0; i < 2; i++) {
    out[i].resize(shape.tokens * x[i].heads * d);
    d_x[i].resize(out[i].size());
    d_weight[i].assign(d, NAN);
    forward.sides[i] = {x[i].view, x[i].heads, given, out[i].data()};
    backward.sides[i] = {d_out[i].view, x[i].view, x[i].heads, given, d_x[i].data(), d_weight[i].data()};
  }
  kernels.rope_qk_norm_forward(forward, parallel);
  kernels.rope_qk_norm_backward(backward, parallel);

  for (int i = 0; i < 2; i++) {
    std::vector<double> d_weights(d);
    for (int64_t token = 0; token < shape.tokens; token++)
      for (int64_t h = 0; h < x[i].heads; h++) {
        const T* found = head_of(out[i], shape, x[i].heads, token, h);
        const T* d_found = head_of(d_x[i], shape, x[i].heads, token, h);
        if (token >= packed) {
          for (int64_t j = 0; j < d; j++) expect_close("slack", to_float(found[j]), 0, 0);
          for (int64_t j = 0; j < d; j++) expect_close("slack of d_x", to_float(d_found[j]), 0, 0);
          continue;
        }
        const T *row = x[i].head(token, h), *gradient = d_out[i].head(token, h);
        double squares = 0, mean = 0;
        for (int64_t j = 0; j < d; j++) squares += double(to_float(row[j])) * to_float(row[j]);
        const double scale = normed ? 1 / std::sqrt(squares / d + 1e-6) : 1;
        std::vector<double> units(d), g(d);
        for (int64_t j = 0; j < d; j++) units[j] = scale * to_float(row[j]);
        for (int64_t j = 0; j < half; j++) {
          const double angle = positions[3 * token + axes[j]] * frequencies[j];
          const double c = std::cos(angle), s = std::sin(angle);
          const double a = units[j] * (normed ? weight[j] : 1);
          const double b = units[half + j] * (normed ? weight[half + j] : 1);
          expect_close("first", to_float(found[j]), a * c - b * s, tolerance<T>(10));
          expect_close("second", to_float(found[half + j]), a * s + b * c, tolerance<T>(10));
          const double da = to_float(gradient[j]), db = to_float(gradient[half + j]);
          g[j] = da * c + db * s;
          g[half + j] = db * c - da * s;
        }
        for (int64_t j = 0; normed && j < d; j++) {
          d_weights[j] += g[j] * units[j];
          g[j] *= weight[j];
          mean += g[j] * units[j] / d;
        }
        for (int64_t j = 0; j < d; j++)
          expect_close("d_x", to_float(d_found[j]), normed ? scale * (g[j] - units[j] * mean) : g[j],
                       tolerance<T>(30 * most(scale, 1.0)));
      }
    for (int64_t j = 0; normed && j < d; j++) expect_close("d_weight", d_weight[i][j], d_weights[j], 1e-3);
  }
}

Registered registered("rope_qk_norm", [](Random& random, const Parallel& parallel) {
  for_each_type([&](auto zero) { check<decltype(zero)>(random, parallel); });
});

}  // namespace
}  // namespace VOT_ISA
}  // namespace vot
