// Softmax attention of every row to one range of keys, and linear attention to far groups, under one normaliser.
//
// Row i sees the keys from low[i] to before high[i] of the same packed buffer of keys; along a segment neither bound
// falls. With the states F of the groups far from row i (S, and beside it the normaliser z),
//
//   out_i = (sum over j of exp(scale q_i.k_j) v_j + exp(beta) phi(q_i) S) / Z_i,   lse_i = log Z_i.
#pragma once
#include "feature_map.h"
#include "head_rows.h"
#include "parallel.h"

namespace vot {

// The floats of a row of a state: head_dim sums, the normaliser, and zeros.
inline int64_t state_row(int head_dim) { return (head_dim + 1 + 15) / 16 * 16; }

// The side of the far part that is known row by row. `states` is null where there is none.
struct FarRows {
  const float* states;   // [slots, kv_heads, width, state_row(head_dim)]
  const int32_t* slots;  // the slot of each row
  HeadRows features;     // what phi is made of: [rows, heads, width]
  FeatureMap map;
  int width;
};

// Rows of one segment, or one part of its keys. Blocks of keys are counted from `first_key`, whatever the task is, so
// that the bits of a row do not depend on how its segment is cut.
struct RangeTask {
  int32_t begin, end;  // rows of a forward task, keys of a backward task
  int32_t first_key, part;
  int32_t first_row, end_row;  // of the segment
};

struct RangeForward {
  HeadRows q, k, v, out;
  float* lse;  // [rows, heads]
  int heads, kv_heads, head_dim;
  float scale;
  const int32_t *low, *high;
  const RangeTask* tasks;
  int64_t num_tasks;
  FarRows far;
  const float* beta;  // [heads], null for 0
};

}  // namespace vot
