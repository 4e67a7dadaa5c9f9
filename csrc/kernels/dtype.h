// The types of numbers that kernels read and write. All of them compute in float.
#pragma once
#include <cstdint>

namespace vot {

// Half precision as it lies in memory.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

enum class Dtype { FLOAT, BF16, F16 };

// body(T{}) for the type T that `dtype` names.
template <class Body>
void with_type(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::FLOAT: return body(float{});
    case Dtype::BF16: return body(bf16{});
    case Dtype::F16: return body(f16{});
  }
}

}  // namespace vot
