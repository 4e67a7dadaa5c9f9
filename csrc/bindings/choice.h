// Which instruction set's kernels run on this processor.
#pragma once
#include "../kernels/list.h"

namespace vot {

struct Choice {
  const char* isa;         // "" where none fits
  const Kernels* kernels;  // null then
};

// The best that the library has and the processor runs, or the one that the environment variable VOT_CPU_ISA names.
// Made once.
const Choice& choice();

inline const Kernels& kernels() { return *choice().kernels; }

}  // namespace vot
