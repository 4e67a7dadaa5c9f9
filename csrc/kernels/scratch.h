// Memory that a thread keeps between calls: it grows, and is given back when the thread ends.
#pragma once
#include <cstdlib>

#include "simd.h"

namespace vot {
namespace VOT_ISA {

// `count` floats aligned to a cache line. Valid until the thread asks again with the same SLOT.
template <int SLOT = 0>
float* scratch(size_t count) {
  static thread_local struct Buffer {
    float* floats = nullptr;
    size_t count = 0;
    ~Buffer() { std::free(floats); }
  } buffer;
  if (buffer.count < count) {
    std::free(buffer.floats);
    buffer.floats = static_cast<float*>(std::aligned_alloc(64, size_t(round_up(int64_t(count) * 4, 64))));
    if (!buffer.floats) std::abort();  // without memory nothing can be computed, and kernels cannot throw
    buffer.count = count;
  }
  return buffer.floats;
}

}  // namespace VOT_ISA
}  // namespace vot
