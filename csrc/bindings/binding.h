// What every binding needs: PyTorch's stable ABI, pointers from tensors, torch's threads.
//
// A binding hands pointers, sizes and strides to a kernel. Python has checked the tensors and allocated the results.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "choice.h"

namespace vot {

using torch::stable::Tensor;

// The pool of torch, with as many threads as torch.set_num_threads says.
Parallel torch_threads();

template <class T = void>
const T* in(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

// Asks the system for large pages where a result is large enough to hold some.
void prefer_large_pages(void* data, int64_t bytes);

// Of a result that was just allocated.
template <class T = void>
T* out(const Tensor& x) {
  void* data = x.mutable_data_ptr();
  prefer_large_pages(data, x.numel() * int64_t(x.element_size()));
  return static_cast<T*>(data);
}

inline std::vector<const void*> ins(const std::vector<Tensor>& tensors) {
  std::vector<const void*> pointers;
  for (const Tensor& x : tensors) pointers.push_back(in(x));
  return pointers;
}
inline std::vector<void*> outs(const std::vector<Tensor>& tensors) {
  std::vector<void*> pointers;
  for (const Tensor& x : tensors) pointers.push_back(out(x));
  return pointers;
}

inline Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case torch::headeronly::ScalarType::BFloat16: return Dtype::BF16;
    case torch::headeronly::ScalarType::Half: return Dtype::F16;
    default: return Dtype::FLOAT;
  }
}

}  // namespace vot
