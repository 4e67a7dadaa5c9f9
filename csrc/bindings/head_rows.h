// Tensors [tokens, heads, width] as kernels of attention take them.
#pragma once
#include <optional>

#include "binding.h"

namespace vot {

using MaybeTensor = std::optional<Tensor>;

template <class T>
const T* in(const MaybeTensor& x) {
  return x ? in<T>(*x) : nullptr;
}
template <class T>
T* out(const MaybeTensor& x) {
  return x ? out<T>(*x) : nullptr;
}

inline HeadRows head_rows(const Tensor& x) {
  return {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1), dtype_of(x)};
}
inline HeadRows head_rows(const MaybeTensor& x) { return x ? head_rows(*x) : HeadRows{}; }
inline Rows rows(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1)}; }

}  // namespace vot
