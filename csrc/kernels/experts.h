// The experts of aoe and moe: what each kernel reads and writes. All numbers are float.
#pragma once
#include "parallel.h"

namespace vot {

// A row of numbers that lie side by side, for every token or slot: row i is at data[i * row].
struct ExpertRows {
  const float* data;
  int64_t row;
};

// A matrix of every expert, in any layout: element [e, r, c] is at data[e * expert + r * row + c * column].
struct ExpertMatrices {
  const float* data;
  int64_t expert, row, column;
};

// The choices grouped by expert, as `Slots` of vot_kernels/ops/parts/experts/slots.py describes them.
struct ExpertSlots {
  const int32_t *order, *offsets;
  int experts, top_k;
};

// Where numbers lie "in panels" [rows], those of the places p to before q, a panel, are the matrix [rows][q - p] at
// data[p * rows]. Which places make a panel depends on the offsets alone; there is no padding.

// Writes order, places and offsets of `Slots`; the slots that no expert has come last in the order.
struct ExpertsGroup {
  const void* indices;  // int64 where `wide`, else int32
  bool wide;
  int64_t token_stride, choice_stride;
  int64_t tokens;
  int experts, top_k;
  int32_t *order, *places, *offsets;
};

// The experts whose caches C = x . w_down^T have the largest norm (+ bias); equal ones by their number, NaN first.
struct AoeSelect {
  ExpertRows x;           // [tokens][dim]
  ExpertMatrices w_down;  // [rank][dim]
  const float* bias;      // [experts] or null
  int64_t tokens;
  int experts, top_k, dim, rank;
  bool softmax_first;  // weights are entries of the softmax over all norms, not the softmax over the selected
  float* norms;        // [tokens][experts]
  int64_t* indices;    // [tokens][top_k]
  float* weights;      // [tokens][top_k]
  float* cache;        // [slots][rank], C of the selected
};

// out = (SiLU(gate) * value) . w_out^T of every slot, with value = x . w_value^T, and gate = cache . w_gate^T where
// there is a cache (rank > 0), else x . w_gate^T.
struct ExpertsForward {
  ExpertRows x;      // [tokens][dim]
  ExpertRows cache;  // [slots][rank]
  ExpertMatrices w_gate, w_value, w_out;  // [hidden][rank or dim], [hidden][dim], [dim][hidden]
  ExpertSlots slots;
  int dim, rank, hidden;
  float* out;             // [slots][dim]
  float *gate, *value;    // in panels [hidden], each null where nobody reads it
};

// out[t] = sum over the slots of token t, in their order, of weight * row. A slot whose place is -1 adds nothing.
struct ExpertsCombine {
  const float* rows;      // [slots][dim]
  const int32_t* places;  // [slots]
  const float* weights;   // [slots], or null for 1
  int64_t tokens;
  int top_k, dim;
  float* out;  // [tokens][dim]
};

// The gradient of a matrix of every expert: element [e, r, c] is at data[e * expert + r * row + c * column]. The last
// stride is 1; for d_w_out one of the last two is.
struct ExpertGradients {
  float* data;
  int64_t expert, row, column;
};

// All gradients of y[t] = sum over the slots of weight * (SiLU(gate) * value) . w_out^T, gate and value as in
// ExpertsForward. Those of x and of the weights come per slot; where there is a cache, what comes through it is not in
// d_x.
struct ExpertsBackward {
  ExpertRows d_y, x;     // [tokens][dim]
  ExpertRows cache;      // [slots][rank], from which the gate is computed again
  ExpertMatrices w_gate, w_value, w_out;  // as in ExpertsForward
  const float *gate, *value;  // in panels [hidden]; there is no gate where there is a cache
  const float* weights;       // [slots]
  ExpertSlots slots;
  int dim, rank, hidden;
  float* d_x;        // [slots][dim]
  float* d_cache;    // [slots][rank]
  float* d_weights;  // [slots]; this and the two above are not written where no expert has the slot
  ExpertGradients d_w_gate, d_w_value, d_w_out;
};

// Gradients of cache = x . w_down^T of every slot: that of x is added to d_x.
struct ExpertsCacheBackward {
  ExpertRows d_cache, x;  // [slots][rank], [tokens][dim]
  ExpertMatrices w_down;  // [rank][dim]
  ExpertSlots slots;
  int dim, rank;
  float* d_x;  // [slots][dim]
  ExpertGradients d_w_down;
};

}  // namespace vot
