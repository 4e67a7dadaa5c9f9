#include "binding.h"

namespace vot {
namespace {

Heads heads(const Tensor& x) { return {const_cast<void*>(in(x)), x.stride(0), x.stride(1)}; }

const float* optional_weight(const std::optional<Tensor>& weight) { return weight ? in<float>(*weight) : nullptr; }

template <class Problem>
Problem problem_of(const Tensor& q, const Tensor& positions, const Tensor& frequencies, const Tensor& axes,
                   double eps) {
  Problem problem = {};
  problem.dtype = dtype_of(q);
  problem.tokens = q.size(0);
  problem.packed = positions.size(0);
  problem.head_dim = q.size(2);
  problem.positions = in<float>(positions);
  problem.frequencies = in<float>(frequencies);
  problem.axes = in<int32_t>(axes);
  problem.eps = float(eps);
  return problem;
}

void rope_qk_norm_forward(const Tensor& q, const Tensor& k, const std::optional<Tensor>& q_weight,
                          const std::optional<Tensor>& k_weight, const Tensor& positions, const Tensor& frequencies,
                          const Tensor& axes, double eps, const Tensor& q_out, const Tensor& k_out) {
  auto problem = problem_of<RopeQkNormForward>(q, positions, frequencies, axes, eps);
  problem.sides[0] = {heads(q), q.size(1), optional_weight(q_weight), out(q_out)};
  problem.sides[1] = {heads(k), k.size(1), optional_weight(k_weight), out(k_out)};
  kernels().rope_qk_norm_forward(problem, torch_threads());
}

void rope_qk_norm_backward(const Tensor& d_q_out, const Tensor& d_k_out, const Tensor& q, const Tensor& k,
                           const std::optional<Tensor>& q_weight, const std::optional<Tensor>& k_weight,
                           const Tensor& positions, const Tensor& frequencies, const Tensor& axes, double eps,
                           const Tensor& dq, const Tensor& dk, const Tensor& d_q_weight, const Tensor& d_k_weight) {
  auto problem = problem_of<RopeQkNormBackward>(q, positions, frequencies, axes, eps);
  problem.sides[0] = {heads(d_q_out), heads(q), q.size(1), optional_weight(q_weight), out(dq),
                      out<float>(d_q_weight)};
  problem.sides[1] = {heads(d_k_out), heads(k), k.size(1), optional_weight(k_weight), out(dk),
                      out<float>(d_k_weight)};
  kernels().rope_qk_norm_backward(problem, torch_threads());
}

}  // namespace
}  // namespace vot

STABLE_TORCH_LIBRARY_FRAGMENT(vot_kernels_cpp, library) {
  library.def(
      "rope_qk_norm_forward(Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor positions, "
      "Tensor frequencies, Tensor axes, float eps, Tensor(a!) q_out, Tensor(b!) k_out) -> ()");
  library.def(
      "rope_qk_norm_backward(Tensor d_q_out, Tensor d_k_out, Tensor q, Tensor k, Tensor? q_weight, "
      "Tensor? k_weight, Tensor positions, Tensor frequencies, Tensor axes, float eps, Tensor(a!) dq, "
      "Tensor(b!) dk, Tensor(c!) d_q_weight, Tensor(d!) d_k_weight) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(vot_kernels_cpp, CPU, library) {
  library.impl("rope_qk_norm_forward", TORCH_BOX(&vot::rope_qk_norm_forward));
  library.impl("rope_qk_norm_backward", TORCH_BOX(&vot::rope_qk_norm_backward));
}
