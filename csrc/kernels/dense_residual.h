// The weighted sum of past states: out = sum over i of weights[i] * states[i], and its gradients.
#pragma once
#include <cstdint>

#include "dtype.h"
#include "parallel.h"

namespace vot {

struct DenseResidualForward {
  Dtype dtype;      // of the states and of out
  int64_t numbers;  // in each state
  int count;        // of states
  const void* const* states;
  const float* weights;  // [count]
  void* out;             // [numbers]
};

struct DenseResidualBackward {
  Dtype dtype;  // of all but the weights and their gradient
  int64_t numbers;
  int count;
  const void* const* states;
  const float* weights;
  const void* d_out;      // [numbers]
  void* const* d_states;  // count of [numbers]
  float* d_weights;       // [count]
};

}  // namespace vot
