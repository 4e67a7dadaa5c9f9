// Sums of many terms that err by a rounding or two, however many there are.
#pragma once
#include "rows.h"

namespace vot {
namespace VOT_ISA {

// A sum and what rounding added to it (Kahan, Further remarks on reducing truncation errors, CACM 8 (1965)).
struct CompensatedSum {
  Vec sum = {}, excess = {};

  VOT_INLINE void add(Vec x) {
    const Vec term = x - excess, next = sum + term;
    excess = (next - sum) - term;
    sum = next;
  }
};

// to[c] = the sum of parts[r * columns + c] over r, for all c.
inline void sum_rows(const float* parts, int64_t rows, int64_t columns, float* to) {
  for_vectors<false>(columns, [&](int64_t c, auto part) {
    CompensatedSum total;
    for (int64_t r = 0; r < rows; r++) total.add(part.get(parts + r * columns + c));
    part.set(to + c, total.sum);
  });
}

}  // namespace VOT_ISA
}  // namespace vot
