// Normalised linear attention of packed segments: o_i = sum_j phi(q_i).phi(k_j) v_j / Z_i over all rows j of a segment,
// or over those up to i; Z_i is the sum of the weights.
#pragma once
#include "feature_map.h"
#include "parallel.h"

namespace vot {

struct LinearAttention {
  Dtype dtype;
  FeatureMap map;
  bool causal;
  int heads, kv_heads, head_dim;
  int64_t tokens, segments;  // rows of the tensors; those from bounds[segments] on are slack
  const int32_t* bounds;     // [segments + 1], rows
  Rows q, k, v;
};

struct LinearAttentionForward {
  LinearAttention inputs;
  MutableRows out;
  float* inverse;  // [tokens, heads], 2^-32 / Z, and 0 where Z is 0
};

struct LinearAttentionBackward {
  LinearAttention inputs;
  Rows d_out;
  const float* inverse;  // of the forward
  MutableRows dq, dk, dv;
};

namespace VOT_ISA {

void linear_attention_forward(const LinearAttentionForward& problem, const Parallel& parallel);
void linear_attention_backward(const LinearAttentionBackward& problem, const Parallel& parallel);

}  // namespace VOT_ISA
}  // namespace vot
