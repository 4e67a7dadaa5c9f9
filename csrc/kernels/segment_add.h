// A row for each segment, added to all of its rows, and the gradients: sums over the rows of each segment.
#pragma once
#include <cstdint>

#include "dtype.h"
#include "parallel.h"

namespace vot {

struct SegmentAddForward {
  Dtype dtype;           // of x and out
  int64_t rows;          // of x and out, slack included
  int64_t segments;
  int64_t width;
  const int32_t* bounds;  // [segments + 1], cumulative lengths
  const void* x;
  int64_t x_stride;        // between rows
  const float* embedding;  // [segments, width]
  void* out;               // [rows, width], zero from row bounds[segments] on
};

struct SegmentAddBackward {
  Dtype dtype;  // of d_out and d_x
  int64_t rows;
  int64_t segments;
  int64_t width;
  const int32_t* bounds;
  const void* d_out;
  int64_t d_out_stride;
  void* d_x;           // [rows, width]
  float* d_embedding;  // [segments, width]
};

}  // namespace vot
