// States of linear attention: sums of phi(k) [v, 1]^T over groups of rows, and their sums over the groups far from each.
//
// A state is `width` rows of `state_row(head_dim)` floats: head_dim sums of phi(k) v, the sum of phi(k), then zeros up to
// whole vectors of any instruction set, so that products with it need no remainder.
#pragma once
#include "feature_map.h"
#include "parallel.h"

namespace vot {

constexpr int64_t state_row(int64_t head_dim) { return (head_dim + 1 + 15) / 16 * 16; }

// states[g][kv_head] = sum of c_i phi(x_i) [v_i, u_i]^T over the rows i of group g, and over the heads that share kv_head.
struct GroupStates {
  Dtype dtype;
  FeatureMap map;
  Rows features, values;  // x [tokens, heads, width] and v [tokens, heads, head_dim]
  int heads, kv_heads, width, head_dim;
  const float* weights;  // c [tokens, heads], or null for 1
  const float* last;     // u [tokens, heads], the column appended to the values, or null for 1
  float scale;           // a factor of every c
  int64_t groups;
  const int32_t *begins, *ends;  // [groups], rows: bounds and bounds + 1 where each group ends as the next begins
  float* states;                 // [groups][kv_heads][width][state_row(head_dim)]
};

// sums[g] = the sum of the states of the groups j < before[g], and of those j >= after[g], in the segment of g; neither
// falls along a segment. One side may be missing (null), and sums overlap if the sides do.
struct FarStates {
  const float* states;  // [groups][size]
  int64_t size, segments;
  const int32_t* bounds;          // [segments + 1], groups
  const int32_t *before, *after;  // [groups]
  float* sums;                    // [groups][size], other memory than the states
};

// sums[s] = the sum of the states of the groups of segment s.
struct SegmentStates {
  const float* states;  // [groups][size]
  int64_t size, segments;
  const int32_t* bounds;  // [segments + 1], groups
  float* sums;            // [segments][size]
};

namespace VOT_ISA {

// In how many parts many rows are worked on: as many for any number of threads, so that sums are the same.
VOT_INLINE int64_t parts_of_rows(int64_t rows) { return most<int64_t>(1, least<int64_t>(rows / 512, 32)); }

// Writes the last columns of a state: the sums of phi(x), [width], and zeros after them.
inline void finish_state(int width, int head_dim, const float* total, float* state) {
  const int64_t row = state_row(head_dim);
  for (int f = 0; f < width; f++) {
    float* tail = state + f * row + head_dim;
    std::memset(tail, 0, size_t(row - head_dim) * sizeof(float));
    tail[0] = total[f];
  }
}

// These take slots 0 to 2 of the scratch memory; a caller keeps what it hands in elsewhere.
void group_states(const GroupStates& problem, const Parallel& parallel);
void far_states(const FarStates& problem, const Parallel& parallel);
void segment_states(const SegmentStates& problem, const Parallel& parallel);

}  // namespace VOT_ISA
}  // namespace vot
