// Every entry point of the kernels, and the table of them that each instruction set has.
#pragma once
#include "dense_residual.h"
#include "parallel.h"

// X(function, its problem), in the order of the files' names.
#define VOT_KERNELS(X)                              \
  X(dense_residual_forward, DenseResidualForward)   \
  X(dense_residual_backward, DenseResidualBackward)

namespace vot {

struct Kernels {
#define VOT_FIELD(function, Problem) void (*function)(const Problem&, const Parallel&);
  VOT_KERNELS(VOT_FIELD)
#undef VOT_FIELD
};

}  // namespace vot
