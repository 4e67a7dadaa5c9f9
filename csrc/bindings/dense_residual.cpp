#include "binding.h"

namespace vot {
namespace {

void dense_residual_forward(const std::vector<Tensor>& states, const Tensor& weights, const Tensor& result) {
  DenseResidualForward problem = {};
  const std::vector<const void*> state_pointers = ins(states);
  problem.dtype = dtype_of(result);
  problem.numbers = result.numel();
  problem.count = int(states.size());
  problem.states = state_pointers.data();
  problem.weights = in<float>(weights);
  problem.out = out(result);
  kernels().dense_residual_forward(problem, torch_threads());
}

void dense_residual_backward(const Tensor& d_out, const std::vector<Tensor>& states, const Tensor& weights,
                             const std::vector<Tensor>& d_states, const Tensor& d_weights) {
  DenseResidualBackward problem = {};
  const std::vector<const void*> state_pointers = ins(states);
  const std::vector<void*> d_state_pointers = outs(d_states);
  problem.dtype = dtype_of(d_out);
  problem.numbers = d_out.numel();
  problem.count = int(states.size());
  problem.states = state_pointers.data();
  problem.weights = in<float>(weights);
  problem.d_out = in(d_out);
  problem.d_states = d_state_pointers.data();
  problem.d_weights = out<float>(d_weights);
  kernels().dense_residual_backward(problem, torch_threads());
}

}  // namespace
}  // namespace vot

STABLE_TORCH_LIBRARY_FRAGMENT(vot_kernels_cpp, library) {
  library.def("dense_residual_forward(Tensor[] states, Tensor weights, Tensor(a!) out) -> ()");
  library.def(
      "dense_residual_backward(Tensor d_out, Tensor[] states, Tensor weights, Tensor(a!)[] d_states, "
      "Tensor(b!) d_weights) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(vot_kernels_cpp, CPU, library) {
  library.impl("dense_residual_forward", TORCH_BOX(&vot::dense_residual_forward));
  library.impl("dense_residual_backward", TORCH_BOX(&vot::dense_residual_backward));
}
