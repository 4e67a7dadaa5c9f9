#include "head_rows.h"

namespace vot {
namespace {

MutableRows mutable_rows(const Tensor& x) { return {out(x), x.stride(0), x.stride(1)}; }

LinearAttention inputs_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bounds, int64_t feature_map,
                          bool causal) {
  LinearAttention inputs = {};
  inputs.dtype = dtype_of(q);
  inputs.map = FeatureMap(feature_map);
  inputs.causal = causal;
  inputs.heads = int(q.size(1));
  inputs.kv_heads = int(k.size(1));
  inputs.head_dim = int(q.size(2));
  inputs.tokens = q.size(0);
  inputs.segments = bounds.size(0) - 1;
  inputs.bounds = in<int32_t>(bounds);
  inputs.q = rows(q);
  inputs.k = rows(k);
  inputs.v = rows(v);
  return inputs;
}

void linear_attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bounds,
                              int64_t feature_map, bool causal, const Tensor& result, const Tensor& inverse) {
  LinearAttentionForward problem = {};
  problem.inputs = inputs_of(q, k, v, bounds, feature_map, causal);
  problem.out = mutable_rows(result);
  problem.inverse = out<float>(inverse);
  kernels().linear_attention_forward(problem, torch_threads());
}

void linear_attention_backward(const Tensor& d_out, const Tensor& inverse, const Tensor& q, const Tensor& k,
                               const Tensor& v, const Tensor& bounds, int64_t feature_map, bool causal, const Tensor& dq,
                               const Tensor& dk, const Tensor& dv) {
  LinearAttentionBackward problem = {};
  problem.inputs = inputs_of(q, k, v, bounds, feature_map, causal);
  problem.d_out = rows(d_out);
  problem.inverse = in<float>(inverse);
  problem.dq = mutable_rows(dq);
  problem.dk = mutable_rows(dk);
  problem.dv = mutable_rows(dv);
  kernels().linear_attention_backward(problem, torch_threads());
}

}  // namespace
}  // namespace vot

STABLE_TORCH_LIBRARY_FRAGMENT(vot_kernels_cpp, library) {
  library.def(
      "linear_attention_forward(Tensor q, Tensor k, Tensor v, Tensor bounds, int feature_map, bool causal, "
      "Tensor(a!) out, Tensor(b!) inverse) -> ()");
  library.def(
      "linear_attention_backward(Tensor d_out, Tensor inverse, Tensor q, Tensor k, Tensor v, Tensor bounds, "
      "int feature_map, bool causal, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(vot_kernels_cpp, CPU, library) {
  library.impl("linear_attention_forward", TORCH_BOX(&vot::linear_attention_forward));
  library.impl("linear_attention_backward", TORCH_BOX(&vot::linear_attention_backward));
}
