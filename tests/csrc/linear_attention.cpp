#include "driver.h"

namespace vot {
namespace VOT_ISA {
namespace {

// Rows [tokens, heads, width] that lie apart: tokens are followed by some numbers that are never read.
template <class T>
struct Block {
  int64_t tokens;
  int heads, width;
  int64_t stride;
  std::vector<T> numbers;

  Block(Random& random, int64_t tokens, int heads, int width)
      : tokens(tokens), heads(heads), width(width), stride(heads * width + random.whole(0, 3)),
        numbers(random.normals<T>(tokens * stride)) {}
  T* data() { return numbers.data(); }
  Rows rows() const { return {numbers.data(), stride, width}; }
  MutableRows mutable_rows() { return {numbers.data(), stride, width}; }
  double at(int64_t token, int head, int column) const {
    return to_float(numbers[token * stride + head * width + column]);
  }
};

template <class T>
std::vector<double> features(FeatureMap map, const Block<T>& x, int64_t token, int head) {
  std::vector<double> result(x.width);
  double total = 0;
  for (int c = 0; c < x.width; c++) total += std::exp(x.at(token, head, c));
  for (int c = 0; c < x.width; c++) {
    const double value = x.at(token, head, c);
    if (map == FeatureMap::SOFTMAX) result[c] = std::exp(value) / total;
    if (map == FeatureMap::ELU) result[c] = value > 0 ? value + 1 : std::exp(value);
    if (map == FeatureMap::RELU) result[c] = value > 0 ? value : 0;
    if (map == FeatureMap::GIVEN) result[c] = value;
  }
  return result;
}

struct Sizes {
  int kv_heads, heads, head_dim;
  std::vector<int32_t> bounds{0};
  int64_t tokens;

  explicit Sizes(Random& random) {
    kv_heads = int(random.whole(1, 3));
    heads = kv_heads * int(random.whole(1, 3));
    head_dim = int(random.chance(0.2) ? random.whole(60, 140) : random.whole(1, 40));
    const int64_t segments = random.whole(0, 4);
    for (int64_t s = 0; s < segments; s++) {
      const int64_t rows = random.chance(0.2) ? 0 : random.whole(1, random.chance(0.1) ? 1200 : 100);
      bounds.push_back(bounds.back() + int32_t(rows));
    }
    tokens = bounds.back() + random.whole(0, 2);
  }
};

// The forward by its definition. Of the backward that dv adds up to d_out: the weights of a row are 1 in all. The ops'
// tests compare the gradients.
template <class T>
void check(Random& random, const Parallel& parallel) {
  const Sizes sizes(random);
  const int repeats = sizes.heads / sizes.kv_heads, width = sizes.head_dim;
  const FeatureMap map = FeatureMap(random.whole(0, 2));
  const bool causal = random.chance(0.5);
  const auto block = [&](int heads) { return Block<T>(random, sizes.tokens, heads, width); };
  const Block<T> q = block(sizes.heads), k = block(sizes.kv_heads), v = block(sizes.kv_heads), d_out = block(sizes.heads);
  Block<T> out = block(sizes.heads), dq = out, dk = k, dv = v;
  std::vector<float> inverse(sizes.tokens * sizes.heads, NAN);
  const LinearAttention inputs{DTYPE<T>,     map,      causal,   sizes.heads, sizes.kv_heads, width, sizes.tokens,
                               int64_t(sizes.bounds.size()) - 1, sizes.bounds.data(), q.rows(), k.rows(), v.rows()};
  kernels.linear_attention_forward({inputs, out.mutable_rows(), inverse.data()}, parallel);
  kernels.linear_attention_backward(
      {inputs, d_out.rows(), inverse.data(), dq.mutable_rows(), dk.mutable_rows(), dv.mutable_rows()}, parallel);
  for (size_t s = 0; s + 1 < sizes.bounds.size(); s++)
    for (int h = 0; h < sizes.heads; h++) {
      const int64_t begin = sizes.bounds[s], end = sizes.bounds[s + 1];
      const int key = h / repeats;
      for (int64_t i = begin; i < end; i += 1 + (end - begin) / 8) {
        std::vector<double> sums(width);
        double total = 0;
        const std::vector<double> query = features(map, q, i, h);
        for (int64_t j = begin; j < (causal ? i + 1 : end); j++) {
          const std::vector<double> other = features(map, k, j, key);
          double weight = 0;
          for (int c = 0; c < width; c++) weight += query[c] * other[c];
          for (int c = 0; c < width; c++) sums[c] += weight * v.at(j, key, c);
          total += weight;
        }
        for (int c = 0; c < width; c++)
          expect_close("out", out.at(i, h, c), total > 0 ? sums[c] / total : 0, tolerance<T>(10));
      }
    }
  for (size_t s = 0; s + 1 < sizes.bounds.size(); s++)
    for (int key = 0; key < sizes.kv_heads; key++)
      for (int c = 0; c < width; c++) {
        double found = 0, expected = 0, scale = 1;
        for (int64_t i = sizes.bounds[s]; i < sizes.bounds[s + 1]; i++) {
          found += dv.at(i, key, c);
          scale += std::fabs(dv.at(i, key, c));
          for (int h = key * repeats; h < (key + 1) * repeats; h++)
            expected += inverse[i * sizes.heads + h] > 0 ? d_out.at(i, h, c) : 0;
        }
        expect_close("sum of dv", found, expected, tolerance<T>(10 * scale));
      }
  for (int64_t i = sizes.bounds.back(); i < sizes.tokens; i++)
    for (int c = 0; c < width; c++) {
      expect_close("slack", out.at(i, 0, c), 0, 0);
      expect_close("slack", dq.at(i, 0, c), 0, 0);
      expect_close("slack", dk.at(i, 0, c), 0, 0);
    }
}

Registered registered("linear_attention", [](Random& random, const Parallel& parallel) {
  for_each_type([&](auto zero) { check<decltype(zero)>(random, parallel); });
});

}  // namespace
}  // namespace VOT_ISA
}  // namespace vot
