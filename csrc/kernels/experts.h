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

// Where numbers of an expert's places lie "transposed", the matrix [rows][its places] of expert e begins at
// data[offsets[e] * rows]. There is no padding.

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
// there is a cache, else x . w_gate^T.
struct ExpertsForward {
  ExpertRows x;      // [tokens][dim]
  ExpertRows cache;  // [slots][rank], or null
  ExpertMatrices w_gate, w_value, w_out;  // [hidden][rank or dim], [hidden][dim], [dim][hidden]
  ExpertSlots slots;
  int dim, rank, hidden;
  float* out;             // [slots][dim]
  float *gate, *value;    // transposed [hidden], each null where nobody reads it
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

// From the gradient of y[t] = sum over the slots of weight * (SiLU(gate) * value) . w_out^T, those of gate and value.
struct ExpertsHiddenBackward {
  ExpertRows d_y;        // [tokens][dim]
  ExpertRows cache;      // [slots][rank], from which the gate is computed again, or null
  ExpertMatrices w_gate, w_out;  // [hidden][rank], read with a cache; [dim][hidden]
  const float *gate, *value;     // transposed [hidden]; there is no gate where there is a cache
  const float* weights;  // [slots]
  ExpertSlots slots;
  int dim, rank, hidden;
  float *d_gate, *d_value;  // transposed [hidden]
  float* weighted;          // transposed [hidden], weight * SiLU(gate) * value
  float* d_weights;         // [slots]; not written where no expert has the slot
};

// From the gradients of gate and value, what every slot adds to that of x; with a cache, also the cache's gradient
// d_cache = d_gate . w_gate + scale * cache.
struct ExpertsInputBackward {
  const float *d_gate, *d_value;  // transposed [hidden]
  ExpertRows cache;               // [slots][rank], or null
  const float* scale;             // [slots], or null for 0
  ExpertMatrices w_gate, w_value, w_down;  // [hidden][rank or dim], [hidden][dim], [rank][dim] read with a cache
  ExpertSlots slots;
  int dim, rank, hidden;
  float* d_x;      // [slots][dim]
  float* d_cache;  // transposed [rank]
};

// out[r, c] of each expert = sum over its places of left[r] * right[c]; 0 for one without places.
struct ExpertsWeightGradient {
  const float* left;   // transposed [rows]
  ExpertRows right;    // [tokens][columns], or [slots][columns]
  bool right_by_slot;
  ExpertSlots slots;
  int rows, columns;
  float* out;
  int64_t out_expert, out_row, out_column;  // strides; one of the last two is 1
};

}  // namespace vot
