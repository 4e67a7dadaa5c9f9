// RMS norm of each head, then its rotation by the token's position, and the gradients.
#pragma once
#include <cstdint>

#include "dtype.h"
#include "parallel.h"

namespace vot {

// Heads of all tokens, [tokens, heads, head_dim], each head's numbers side by side.
struct Heads {
  void* data;
  int64_t token_stride, head_stride;
};

struct RopeQkNormForward {
  struct Side {  // q, or k
    Heads x;
    int64_t heads;
    const float* weight;  // [head_dim], null where nothing is normalised
    void* out;            // [tokens, heads, head_dim]
  };
  Dtype dtype;
  int64_t tokens;            // of q and k, slack included
  int64_t packed;            // tokens that have a position; the rest become zero
  int64_t head_dim;
  const float* positions;    // [packed, 3]
  const float* frequencies;  // [head_dim / 2]
  const int32_t* axes;       // [head_dim / 2], of positions
  float eps;
  Side sides[2];
};

struct RopeQkNormBackward {
  struct Side {
    Heads d_out, x;
    int64_t heads;
    const float* weight;
    void* d_x;        // [tokens, heads, head_dim]
    float* d_weight;  // [head_dim], unused where there is no weight
  };
  Dtype dtype;
  int64_t tokens, packed, head_dim;
  const float* positions;
  const float* frequencies;
  const int32_t* axes;
  float eps;
  Side sides[2];
};

}  // namespace vot
