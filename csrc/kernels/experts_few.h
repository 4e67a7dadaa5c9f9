// Products for blocks of few places: weights are read in vectors, once, and nothing is filled up. Rows of the places are
// not transposed here.
#pragma once
#include "experts_blocks.h"

namespace vot {
namespace VOT_ISA {

constexpr int FEW = 40;  // places; for more of them the transposed products are faster
// So many rows of weights are multiplied with so many places at a time: their sums fill the registers.
constexpr int FEW_ROWS = 4;
constexpr int FEW_TOKENS = LANES == 16 ? 5 : 3;

// out[TOKENS][width] = x[TOKENS][depth] . W^T for the first FEW_ROWS of `rows` rows of W, whose numbers lie side by side.
// Meanwhile the rows `from` to before `to` are asked for.
template <int TOKENS>
VOT_INLINE void row_products(Left w, int rows, int depth, const float* x, float* out, int width, int from, int to) {
  Vec sums[FEW_ROWS][TOKENS] = {};
  const auto step = [&](auto read) {
    Vec columns[TOKENS];
    for (int t = 0; t < TOKENS; t++) columns[t] = read(x + t * depth);
    for (int i = 0; i < FEW_ROWS; i++) {
      const Vec weights = read(w.data + least(i, rows - 1) * w.row);
      for (int t = 0; t < TOKENS; t++) sums[i][t] += weights * columns[t];
    }
  };
  int k = 0;
  for (; k + LANES <= depth; k += LANES) {
    for (int i = from; i < to; i++) __builtin_prefetch(w.data + i * w.row + k);
    step([k](const float* from) { return load(from + k); });
  }
  if (k < depth) step([k, depth](const float* from) { return load_part(from + k, depth - k); });
  for (int i = 0; i < least(FEW_ROWS, rows); i++)
    for (int t = 0; t < TOKENS; t++) out[t * width + i] = sum(sums[i][t]);
}

// Whether few_products reads such a matrix of `rows` rows.
VOT_INLINE bool is_readable(const ExpertMatrices& w, int rows) {
  return w.column == 1 || (w.row == 1 && rows % LANES == 0);
}

// out[count][rows] = x[count][depth] . W^T
inline void few_products(Left w, int rows, int depth, const float* x, int count, float* out) {
  if (w.column != 1) {  // the rows of W^T lie side by side
    for (int k = 0; k == 0 || k < depth; k += DEPTH)
      multiply(count, rows, {x + k, depth, 1}, {w.data + k * w.column, w.column}, least(DEPTH, depth - k), {out, rows},
               k ? Old::KEEP : Old::CLEAR);
    return;
  }
  const int groups = (count + FEW_TOKENS - 1) / FEW_TOKENS;
  for (int r = 0; r < rows; r += FEW_ROWS) {  // these are used by every place while they are near
    const int next = least(FEW_ROWS, rows - r - FEW_ROWS);  // rows, of which each group of places asks for some
    for (int g = 0; g < groups; g++) {
      const int t = g * FEW_TOKENS, from = FEW_ROWS + next * g / groups, to = FEW_ROWS + next * (g + 1) / groups;
      const auto products = [&](auto tokens) __attribute__((always_inline)) {
        row_products<decltype(tokens)::value>(w.below(r), rows - r, depth, x + t * depth, out + t * rows + r, rows, from, to);
      };
      switch (least(FEW_TOKENS, count - t)) {
        case 1: products(Number<1>{}); break;
        case 2: products(Number<2>{}); break;
        case 3: products(Number<3>{}); break;
        case 4: products(Number<least(4, FEW_TOKENS)>{}); break;
        default: products(Number<FEW_TOKENS>{});
      }
    }
  }
}

}  // namespace VOT_ISA
}  // namespace vot
