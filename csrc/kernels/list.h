// Every entry point of the kernels, and the table of them that each instruction set has.
#pragma once
#include "dense_residual.h"
#include "experts.h"
#include "group_states.h"
#include "linear_attention.h"
#include "pack_patches.h"
#include "parallel.h"
#include "range_attention.h"
#include "rope_qk_norm.h"
#include "segment_add.h"

// X(function, its problem), in the order of the files' names.
#define VOT_KERNELS(X)                                  \
  X(dense_residual_forward, DenseResidualForward)       \
  X(dense_residual_backward, DenseResidualBackward)     \
  X(aoe_select, AoeSelect)                              \
  X(experts_group, ExpertsGroup)                        \
  X(experts_forward, ExpertsForward)                    \
  X(experts_combine, ExpertsCombine)                    \
  X(experts_backward, ExpertsBackward)                  \
  X(experts_cache_backward, ExpertsCacheBackward)       \
  X(group_states, GroupStates)                          \
  X(far_states, FarStates)                              \
  X(linear_attention_forward, LinearAttentionForward)   \
  X(linear_attention_backward, LinearAttentionBackward) \
  X(pack_patches_forward, PackPatches)                  \
  X(pack_patches_backward, PackPatches)                 \
  X(range_attention_forward, RangeForward)              \
  X(range_attention_rows_backward, RangeRowsBackward)   \
  X(range_attention_keys_backward, RangeKeysBackward)   \
  X(range_attention_sum_parts, RangeSumParts)           \
  X(rope_qk_norm_forward, RopeQkNormForward)            \
  X(rope_qk_norm_backward, RopeQkNormBackward)          \
  X(segment_add_forward, SegmentAddForward)             \
  X(segment_add_backward, SegmentAddBackward)

namespace vot {

struct Kernels {
#define VOT_FIELD(function, Problem) void (*function)(const Problem&, const Parallel&);
  VOT_KERNELS(VOT_FIELD)
#undef VOT_FIELD
};

}  // namespace vot
