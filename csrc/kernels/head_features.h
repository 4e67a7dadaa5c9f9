// Features of rows of a tensor [tokens, heads, width].
#pragma once
#include "feature_map.h"
#include "head_rows.h"

namespace vot {
namespace VOT_ISA {

// The softmax of two rows of N vectors, which stay in registers. A row's sums are a chain of steps that each wait for the
// last, so that two rows take hardly longer than one.
template <int N, class T>
VOT_INLINE void softmax_of_two(const T* const (&rows)[2], float* const (&out)[2]) {
  Vec x[2][N], largest[2], total[2], share[2];
#pragma GCC unroll 2
  for (int r = 0; r < 2; r++) {
    largest[r] = splat(-INF), total[r] = Vec{};
#pragma GCC unroll 4
    for (int i = 0; i < N; i++) largest[r] = greater_of(x[r][i] = load(rows[r] + i * LANES), largest[r]);
  }
#pragma GCC unroll 2
  for (int r = 0; r < 2; r++) largest[r] = splat(greatest(largest[r]));
#pragma GCC unroll 4
  for (int i = 0; i < N; i++)
#pragma GCC unroll 2
    for (int r = 0; r < 2; r++) total[r] += x[r][i] = exp(x[r][i] - largest[r]);
#pragma GCC unroll 2
  for (int r = 0; r < 2; r++) share[r] = splat(1 / sum(total[r]));
#pragma GCC unroll 2
  for (int r = 0; r < 2; r++)
#pragma GCC unroll 4
    for (int i = 0; i < N; i++) store(out[r] + i * LANES, x[r][i] * share[r]);
}

// phi of `count` rows, those of token(i) and head(i), `stride` floats apart.
template <class Token, class Head>
VOT_INLINE void read_features(const HeadRows& rows, FeatureMap map, int width, int count, const Token& token,
                              const Head& head, float* to, int stride) {
  int i = 0;
  if (map == FeatureMap::SOFTMAX && width == 4 * LANES)
    for (; i + 2 <= count; i += 2) {
      const int64_t apart = (token(i + 1) - token(i)) * rows.token + (head(i + 1) - head(i)) * rows.head;
      with_row(rows, token(i), head(i), [&](const auto* x) {
        softmax_of_two<4>({x, x + apart}, {to + i * stride, to + (i + 1) * stride});
      });
    }
  for (; i < count; i++)
    with_row(rows, token(i), head(i), [&](const auto* x) { feature_row(map, x, width, to + i * stride); });
}

}  // namespace VOT_ISA
}  // namespace vot
