// Images and clips cut into patches, and patches put together to images: numbers are moved, whatever they are.
#pragma once
#include <cstdint>

#include "parallel.h"

namespace vot {

// Numbers [frames, channels, height, width]; a still image that stands for all frames of a patch has frame stride 0.
struct Clip {
  void* data;
  int64_t frames, height, width;
  int64_t frame_stride, channel_stride, row_stride, column_stride;
};

// Forward, clips become patches; backward, patches become clips, whose columns then lie side by side.
struct PackPatches {
  int64_t item_bytes;  // of a number: 1, 2, 4 or 8
  int64_t clips;
  const Clip* clip;
  int64_t channels;
  int64_t patch_size;           // height and width of a patch
  int64_t temporal_patch_size;  // frames of a patch
  // [patches, channels, temporal_patch_size, patch_size, patch_size], those of a clip in the order (t, y, x)
  void* patches;
};

}  // namespace vot
