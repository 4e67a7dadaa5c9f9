#include "binding.h"

namespace vot {
namespace {

void segment_add_forward(const Tensor& x, const Tensor& embedding, const Tensor& bounds, const Tensor& result) {
  SegmentAddForward problem = {};
  problem.dtype = dtype_of(x);
  problem.rows = x.size(0);
  problem.segments = bounds.size(0) - 1;
  problem.width = x.size(1);
  problem.bounds = in<int32_t>(bounds);
  problem.x = in(x);
  problem.x_stride = x.stride(0);
  problem.embedding = in<float>(embedding);
  problem.out = out(result);
  kernels().segment_add_forward(problem, torch_threads());
}

void segment_add_backward(const Tensor& d_out, const Tensor& bounds, const Tensor& d_x, const Tensor& d_embedding) {
  SegmentAddBackward problem = {};
  problem.dtype = dtype_of(d_out);
  problem.rows = d_out.size(0);
  problem.segments = bounds.size(0) - 1;
  problem.width = d_out.size(1);
  problem.bounds = in<int32_t>(bounds);
  problem.d_out = in(d_out);
  problem.d_out_stride = d_out.stride(0);
  problem.d_x = out(d_x);
  problem.d_embedding = out<float>(d_embedding);
  kernels().segment_add_backward(problem, torch_threads());
}

}  // namespace
}  // namespace vot

STABLE_TORCH_LIBRARY_FRAGMENT(vot_kernels_cpp, library) {
  library.def("segment_add_forward(Tensor x, Tensor embedding, Tensor bounds, Tensor(a!) out) -> ()");
  library.def("segment_add_backward(Tensor d_out, Tensor bounds, Tensor(a!) d_x, Tensor(b!) d_embedding) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(vot_kernels_cpp, CPU, library) {
  library.impl("segment_add_forward", TORCH_BOX(&vot::segment_add_forward));
  library.impl("segment_add_backward", TORCH_BOX(&vot::segment_add_backward));
}
