// Rows of heads and their features, in plain loops.
#pragma once
#include "../../csrc/kernels/feature_map.h"
#include "driver.h"

namespace vot {
namespace VOT_ISA {

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
  std::vector<double> row(int64_t token, int head) const {
    std::vector<double> result;
    for (int c = 0; c < width; c++) result.push_back(at(token, head, c));
    return result;
  }
};

inline std::vector<double> features(FeatureMap map, std::vector<double> x) {
  double total = 0;
  for (double value : x) total += std::exp(value);
  for (double& value : x) {
    if (map == FeatureMap::SOFTMAX) value = std::exp(value) / total;
    if (map == FeatureMap::ELU) value = value > 0 ? value + 1 : std::exp(value);
    if (map == FeatureMap::RELU) value = value > 0 ? value : 0;
  }
  return x;
}

}  // namespace VOT_ISA
}  // namespace vot
