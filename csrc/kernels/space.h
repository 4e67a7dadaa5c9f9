// One piece of memory, handed out in parts.
#pragma once
#include "simd.h"

namespace vot {
namespace VOT_ISA {

// Without memory it counts the floats that it would hand out: ask twice, first for the size.
struct Space {
  float* memory = nullptr;
  int64_t taken = 0;

  float* take(int64_t count) {
    float* piece = memory + taken;
    taken += round_up(count, 16);
    return piece;
  }
};

}  // namespace VOT_ISA
}  // namespace vot
