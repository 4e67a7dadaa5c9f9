// Feature maps of linear attention: phi(x) >= 0 of the rows of q and k.
#pragma once
#include "strided_rows.h"

namespace vot {

enum class FeatureMap { SOFTMAX, ELU, RELU, GIVEN };  // softmax over the row, elu + 1, relu, or features as they are

namespace VOT_ISA {

// The first `count` lanes of x, and `other` after them.
VOT_INLINE Vec first_lanes(Vec x, int count, float other) {
  const IntVec inside = lane_numbers() < (IntVec{} + count);
  return (Vec)(((IntVec)x & inside) | ((IntVec)splat(other) & ~inside));
}

template <class T>
VOT_INLINE void softmax_row(const T* row, int width, float* out) {
  Vec largest = splat(-INF);
  for_vectors(width, [&](int c, int count) {
    const Vec x = first_lanes(load_of(row, c, count), count, -INF);
    largest = greater_of(x, largest);
    store(out + c, x);
  });
  const Vec shift = splat(greatest(largest));
  Vec total = {};
  for_vectors(width, [&](int c, int) {
    const Vec x = exp(load(out + c) - shift);
    total += x;
    store(out + c, x);
  });
  const Vec share = splat(1 / sum(total));
  for_vectors(width, [&](int c, int) { store(out + c, load(out + c) * share); });
}

// The vectors of a row that softmax_of_two() takes: 64 numbers, a usual width of a head, where vectors are wide.
constexpr int PAIR_VECTORS = VOT_VECTOR_BYTES == 32 ? 8 : 4;

// The softmax of two rows of N vectors, times a weight each. A row's sums are a chain of steps that each wait for the
// last, so that two rows take hardly longer than one.
template <int N, class T>
VOT_INLINE void softmax_of_two(const T* const (&rows)[2], const float (&weights)[2], float* const (&out)[2]) {
  Vec x[2][N], largest[2], total[2], share[2];
#pragma GCC unroll 2
  for (int r = 0; r < 2; r++) {
    largest[r] = splat(-INF), total[r] = Vec{};
#pragma GCC unroll 8
    for (int i = 0; i < N; i++) largest[r] = greater_of(x[r][i] = load(rows[r] + i * LANES), largest[r]);
  }
#pragma GCC unroll 2
  for (int r = 0; r < 2; r++) largest[r] = splat(greatest(largest[r]));
#pragma GCC unroll 8
  for (int i = 0; i < N; i++)
#pragma GCC unroll 2
    for (int r = 0; r < 2; r++) total[r] += x[r][i] = exp(x[r][i] - largest[r]);
#pragma GCC unroll 2
  for (int r = 0; r < 2; r++) share[r] = splat(weights[r] / sum(total[r]));
#pragma GCC unroll 2
  for (int r = 0; r < 2; r++)
#pragma GCC unroll 8
    for (int i = 0; i < N; i++) store(out[r] + i * LANES, x[r][i] * share[r]);
}

// phi of a row. `out` has room for whole vectors, and zeros where the row ends within one.
template <class T>
VOT_INLINE void feature_row(FeatureMap map, const T* row, int width, float* out) {
  if (map == FeatureMap::SOFTMAX) return softmax_row(row, width, out);
  for_vectors(width, [&](int c, int count) {
    Vec x = load_of(row, c, count);
    // Comparisons with NaN are false, and these keep it.
    if (map == FeatureMap::ELU) x = first_lanes(x > 0 ? x + 1 : exp(x), count, 0);
    if (map == FeatureMap::RELU) x = x < 0 ? Vec{} : x;
    store(out + c, x);
  });
}

// The gradient of a row, given its features and theirs; `out` may be `d_features`. All have room for whole vectors.
VOT_INLINE void feature_row_backward(FeatureMap map, const float* features, const float* d_features, int width,
                                     float* out) {
  Vec shift = {};
  if (map == FeatureMap::SOFTMAX) {
    for_vectors(width, [&](int c, int count) {
      shift += first_lanes(load(features + c) * load(d_features + c), count, 0);
    });
    shift = splat(sum(shift));
  }
  for_vectors(width, [&](int c, int) {
    const Vec phi = load(features + c);
    Vec x = load(d_features + c);
    if (map == FeatureMap::SOFTMAX) x = phi * (x - shift);
    if (map == FeatureMap::ELU) x = x * (phi < 1 ? phi : splat(1));  // elu + 1 is its own derivative below 0
    if (map == FeatureMap::RELU) x = phi > 0 ? x : Vec{};
    store(out + c, x);
  });
}

}  // namespace VOT_ISA
}  // namespace vot
