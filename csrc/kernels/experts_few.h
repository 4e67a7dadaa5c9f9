// Products for blocks of so few places that reading the weights takes longer than multiplying: every weight is read once,
// in vectors, and nothing is filled up. Rows of the places are not transposed here.
#pragma once
#include "experts_blocks.h"

namespace vot {
namespace VOT_ISA {

constexpr int FEW = 8;                          // places
constexpr int FEW_TOKENS = LANES == 16 ? 4 : 2;  // whose sums, with those of 4 rows of weights, fit the registers

// out[TOKENS][rows] = x[TOKENS][depth] . W^T for rows of W whose numbers lie side by side.
template <int TOKENS>
VOT_INLINE void row_products(Left w, int rows, int depth, const float* x, float* out) {
  constexpr int ROWS = 4;
  for (int r = 0; r < rows; r += ROWS) {
    Vec sums[ROWS][TOKENS] = {};
    const auto step = [&](auto read) {
      Vec columns[TOKENS];
      for (int t = 0; t < TOKENS; t++) columns[t] = read(x + t * depth);
      for (int i = 0; i < ROWS; i++) {
        const Vec weights = read(w.data + least(r + i, rows - 1) * w.row);
        for (int t = 0; t < TOKENS; t++) sums[i][t] += weights * columns[t];
      }
    };
    int k = 0;
    for (; k + LANES <= depth; k += LANES) step([k](const float* from) { return load(from + k); });
    if (k < depth) step([k, depth](const float* from) { return load_part(from + k, depth - k); });
    for (int i = 0; i < least(ROWS, rows - r); i++)
      for (int t = 0; t < TOKENS; t++) out[t * rows + r + i] = sum(sums[i][t]);
  }
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
  int t = 0;
  for (; t + FEW_TOKENS <= count; t += FEW_TOKENS)
    row_products<FEW_TOKENS>(w, rows, depth, x + t * depth, out + t * rows);
  for (; t < count; t++) row_products<1>(w, rows, depth, x + t * depth, out + t * rows);
}

}  // namespace VOT_ISA
}  // namespace vot
