// Softmax attention of every row to one range of keys, and linear attention to far groups, under one normaliser.
//
// Row i sees the keys from low[i] to before high[i] of the same packed buffer of keys; along a segment neither bound
// falls. With the states F of the groups far from row i (S, and beside it the normaliser z),
//
//   out_i = (sum over j of exp(scale q_i.k_j) v_j + exp(beta) phi(q_i) S) / Z_i,   lse_i = log Z_i.
//
// A state pays for itself where it stands for many keys. Next to the near keys there may be some that are far and in no
// state: those of [reach_low[i], reach_high[i]) outside of [low[i], high[i]) are taken one by one, each with the weight
// exp(beta) phi(q_i).phi(k_j).
#pragma once
#include "group_states.h"
#include "head_rows.h"
#include "parallel.h"

namespace vot {

// The side of the far part that is known row by row.
struct FarRows {
  const float* states;   // [slots, kv_heads, width, state_row(head_dim)]
  const int32_t* slots;  // the slot of each row, -1 for none
  HeadRows features;     // what phi is made of: [rows, heads, width]; without data where there is no far part
  FeatureMap map;
  int width;

  bool any() const { return features.data; }
};

// Pairs of a row and a far key that are in no state. `low` is null where there are none.
struct FarPairs {
  const int32_t *low, *high;  // [rows], what a row reaches; along a segment neither bound falls
  HeadRows features;          // of the other side of a pair than that of FarRows
};

// What a forward or a rows task does: rows of a piece, a run of rows that see no key in common with others. The bits of
// a row do not depend on how its piece is cut into tasks, because blocks of keys are counted from the first key of the
// piece.
struct RowsTask {
  int32_t begin, end;  // rows, all of one piece
  int32_t first_key;   // of the piece
};

struct RangeForward {
  HeadRows q, k, v, out;
  float* lse;  // [rows, heads]
  int heads, kv_heads, head_dim;
  float scale;
  const int32_t *low, *high;  // [rows]
  const RowsTask* tasks;
  int64_t num_tasks;
  FarRows far;
  FarPairs pairs;
  const float* beta;  // [heads], null for 0
};

// The first step of the backward, row by row: delta = d_out.out - d_lse, and what far states have for the rows. With
// weight = exp(beta - lse) and g = [d_out, -delta],
//
//   d_features = weight g F^T,   d_beta = phi(q).d_features.
//
// Through the feature map d_features is the begin of dq, which the next step completes.
struct RangeRowsBackward {
  HeadRows d_out, out;
  const float *lse, *d_lse;  // [rows, heads]; d_lse is null for 0
  float* delta;              // [rows, heads]
  int heads, kv_heads, head_dim;
  const RowsTask* tasks;
  int64_t num_tasks;
  FarRows far;
  const float* beta;
  float *far_weight, *d_beta;  // [rows, heads]
  HeadRows d_features;         // of given features, or of q
};

// What a keys task does: a part of the keys of a segment, and all rows that see some of them.
struct KeysTask {
  int32_t begin, end;          // keys
  int32_t first_row, end_row;  // of the segment
  int32_t part;                // which of the buffers of dq gets the sums
};

// The second step. With p = exp(scale q.k - lse) and the states F' of the rows from which a key is far, which are sums
// of weight phi(q) g,
//
//   dv = p^T d_out + phi(k) F',   ds = p (d_out.v - delta),   dq = scale ds k,   dk = scale ds^T q + d_phi(k)
//
// where d_phi(k) = [v, 1] F'^T goes through the feature map, or into d_features if they are given. Far pairs add, with
// weight the row's,
//
//   dv += weight phi(q).phi(k) d_out,   d_phi(q) += weight (d_out.v - delta) phi(k),   d_phi(k) likewise with phi(q).
struct RangeKeysBackward {
  HeadRows d_out, q, k, v, dk, dv;
  const float *lse, *delta;  // [rows, heads]
  const float* begun;        // [rows, heads, head_dim]: what dq begins with, or null for 0
  float* dq;                 // [parts, rows, heads, head_dim]; rows that no task of a part reaches are not written
  int64_t rows;
  int heads, kv_heads, head_dim;
  float scale;
  const int32_t *low, *high;  // [rows]
  const KeysTask* tasks;
  int64_t num_tasks;
  FarRows far;  // of the keys
  HeadRows d_features;
  FarPairs pairs;           // with the features of the rows
  const float* far_weight;  // [rows, heads]
  float* d_beta;            // [parts, rows, heads], the shares of pairs are added to it; null if nobody asks
  float* d_q_features;      // [parts, rows, heads, width], as dq: the shares of pairs in those of given features
};

// Rows whose dq is the sum of some parts.
struct SumTask {
  int32_t begin, end;
  int32_t first_part, end_part;
};

// The last step: dq = begun + the parts, in their order.
struct RangeSumParts {
  const float *begun, *parts;
  HeadRows dq;
  int64_t rows;
  int heads, head_dim;
  const SumTask* tasks;
  int64_t num_tasks;
};

}  // namespace vot
