// Features of rows of a tensor [tokens, heads, width].
#pragma once
#include "feature_map.h"
#include "head_rows.h"

namespace vot {
namespace VOT_ISA {

// phi of `count` rows, those of token(i) and head(i), `stride` floats apart.
template <class Token, class Head>
VOT_INLINE void read_features(const HeadRows& rows, FeatureMap map, int width, int count, const Token& token,
                              const Head& head, float* to, int stride) {
  int i = 0;
  if (map == FeatureMap::SOFTMAX && width == PAIR_VECTORS * LANES)
    for (; i + 2 <= count; i += 2) {
      const int64_t apart = (token(i + 1) - token(i)) * rows.token + (head(i + 1) - head(i)) * rows.head;
      with_row(rows, token(i), head(i), [&](const auto* x) {
        softmax_of_two<PAIR_VECTORS>({x, x + apart}, {1, 1}, {to + i * stride, to + (i + 1) * stride});
      });
    }
  for (; i < count; i++)
    with_row(rows, token(i), head(i), [&](const auto* x) { feature_row(map, x, width, to + i * stride); });
}

}  // namespace VOT_ISA
}  // namespace vot
