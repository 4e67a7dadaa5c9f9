#include <optional>

#include "binding.h"

namespace vot {
namespace {

using Optional = std::optional<Tensor>;

const float* in_if(const Optional& x) { return x ? in<float>(*x) : nullptr; }
float* out_if(const Optional& x) { return x ? out<float>(*x) : nullptr; }

ExpertRows rows_of(const Tensor& x) { return {in<float>(x), x.stride(0)}; }
ExpertRows rows_if(const Optional& x) { return x ? rows_of(*x) : ExpertRows{}; }
ExpertMatrices matrices(const Tensor& w) { return {in<float>(w), w.stride(0), w.stride(1), w.stride(2)}; }
ExpertGradients gradients(const Tensor& w) { return {out<float>(w), w.stride(0), w.stride(1), w.stride(2)}; }
ExpertSlots slots_of(const Tensor& order, const Tensor& offsets, int64_t top_k) {
  return {in<int32_t>(order), in<int32_t>(offsets), int(offsets.numel() - 1), int(top_k)};
}
int width_of(const Tensor& x) { return int(x.size(1)); }
int width_if(const Optional& x) { return x ? width_of(*x) : 0; }

void group(const Tensor& indices, const Tensor& order, const Tensor& places, const Tensor& offsets) {
  ExpertsGroup problem = {};
  problem.indices = in(indices);
  problem.wide = indices.scalar_type() == torch::headeronly::ScalarType::Long;
  problem.token_stride = indices.stride(0);
  problem.choice_stride = indices.stride(1);
  problem.tokens = indices.size(0);
  problem.experts = int(offsets.numel() - 1);
  problem.top_k = width_of(indices);
  problem.order = out<int32_t>(order);
  problem.places = out<int32_t>(places);
  problem.offsets = out<int32_t>(offsets);
  kernels().experts_group(problem, torch_threads());
}

void select(const Tensor& x, const Tensor& w_down, const Optional& bias, bool softmax_first, const Tensor& norms,
            const Tensor& indices, const Tensor& weights, const Tensor& cache) {
  AoeSelect problem = {};
  problem.x = rows_of(x);
  problem.w_down = matrices(w_down);
  problem.bias = in_if(bias);
  problem.tokens = x.size(0);
  problem.experts = width_of(norms);
  problem.top_k = width_of(indices);
  problem.dim = width_of(x);
  problem.rank = width_of(w_down);
  problem.softmax_first = softmax_first;
  problem.norms = out<float>(norms);
  problem.indices = out<int64_t>(indices);
  problem.weights = out<float>(weights);
  problem.cache = out<float>(cache);
  kernels().aoe_select(problem, torch_threads());
}

void forward(const Tensor& x, const Optional& cache, const Tensor& w_gate, const Tensor& w_value, const Tensor& w_out,
             const Tensor& order, const Tensor& offsets, int64_t top_k, const Tensor& result, const Optional& gate,
             const Optional& value) {
  ExpertsForward problem = {};
  problem.x = rows_of(x);
  problem.cache = rows_if(cache);
  problem.w_gate = matrices(w_gate);
  problem.w_value = matrices(w_value);
  problem.w_out = matrices(w_out);
  problem.slots = slots_of(order, offsets, top_k);
  problem.dim = width_of(x);
  problem.rank = width_if(cache);
  problem.hidden = width_of(w_value);
  problem.out = out<float>(result);
  problem.gate = out_if(gate);
  problem.value = out_if(value);
  kernels().experts_forward(problem, torch_threads());
}

void combine(const Tensor& rows, const Tensor& places, const Optional& weights, int64_t top_k, const Tensor& result) {
  ExpertsCombine problem = {};
  problem.rows = in<float>(rows);
  problem.places = in<int32_t>(places);
  problem.weights = in_if(weights);
  problem.tokens = result.size(0);
  problem.top_k = int(top_k);
  problem.dim = width_of(result);
  problem.out = out<float>(result);
  kernels().experts_combine(problem, torch_threads());
}

void backward(const Tensor& d_y, const Tensor& x, const Optional& cache, const Tensor& w_gate, const Tensor& w_value,
              const Tensor& w_out, const Optional& gate, const Tensor& value, const Tensor& weights,
              const Tensor& order, const Tensor& offsets, int64_t top_k, const Tensor& d_x, const Optional& d_cache,
              const Tensor& d_weights, const Tensor& d_w_gate, const Tensor& d_w_value, const Tensor& d_w_out) {
  ExpertsBackward problem = {};
  problem.d_y = rows_of(d_y);
  problem.x = rows_of(x);
  problem.cache = rows_if(cache);
  problem.w_gate = matrices(w_gate);
  problem.w_value = matrices(w_value);
  problem.w_out = matrices(w_out);
  problem.gate = in_if(gate);
  problem.value = in<float>(value);
  problem.weights = in<float>(weights);
  problem.slots = slots_of(order, offsets, top_k);
  problem.dim = width_of(x);
  problem.rank = width_if(cache);
  problem.hidden = width_of(w_value);
  problem.d_x = out<float>(d_x);
  problem.d_cache = out_if(d_cache);
  problem.d_weights = out<float>(d_weights);
  problem.d_w_gate = gradients(d_w_gate);
  problem.d_w_value = gradients(d_w_value);
  problem.d_w_out = gradients(d_w_out);
  kernels().experts_backward(problem, torch_threads());
}

void cache_backward(const Tensor& d_cache, const Tensor& x, const Tensor& w_down, const Tensor& order,
                    const Tensor& offsets, int64_t top_k, const Tensor& d_x, const Tensor& d_w_down) {
  ExpertsCacheBackward problem = {};
  problem.d_cache = rows_of(d_cache);
  problem.x = rows_of(x);
  problem.w_down = matrices(w_down);
  problem.slots = slots_of(order, offsets, top_k);
  problem.dim = width_of(x);
  problem.rank = width_of(w_down);
  problem.d_x = out<float>(d_x);
  problem.d_w_down = gradients(d_w_down);
  kernels().experts_cache_backward(problem, torch_threads());
}

}  // namespace
}  // namespace vot

STABLE_TORCH_LIBRARY_FRAGMENT(vot_kernels_cpp, library) {
  library.def("experts_group(Tensor indices, Tensor(a!) order, Tensor(b!) places, Tensor(c!) offsets) -> ()");
  library.def(
      "aoe_select(Tensor x, Tensor w_down, Tensor? bias, bool softmax_first, Tensor(a!) norms, Tensor(b!) indices, "
      "Tensor(c!) weights, Tensor(d!) cache) -> ()");
  library.def(
      "experts_forward(Tensor x, Tensor? cache, Tensor w_gate, Tensor w_value, Tensor w_out, Tensor order, "
      "Tensor offsets, int top_k, Tensor(a!) out, Tensor(b!)? gate, Tensor(c!)? value) -> ()");
  library.def(
      "experts_combine(Tensor rows, Tensor places, Tensor? weights, int top_k, Tensor(a!) out) -> ()");
  library.def(
      "experts_backward(Tensor d_y, Tensor x, Tensor? cache, Tensor w_gate, Tensor w_value, Tensor w_out, Tensor? gate, "
      "Tensor value, Tensor weights, Tensor order, Tensor offsets, int top_k, Tensor(a!) d_x, Tensor(b!)? d_cache, "
      "Tensor(c!) d_weights, Tensor(d!) d_w_gate, Tensor(e!) d_w_value, Tensor(f!) d_w_out) -> ()");
  library.def(
      "experts_cache_backward(Tensor d_cache, Tensor x, Tensor w_down, Tensor order, Tensor offsets, int top_k, "
      "Tensor(a!) d_x, Tensor(b!) d_w_down) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(vot_kernels_cpp, CPU, library) {
  library.impl("experts_group", TORCH_BOX(&vot::group));
  library.impl("aoe_select", TORCH_BOX(&vot::select));
  library.impl("experts_forward", TORCH_BOX(&vot::forward));
  library.impl("experts_combine", TORCH_BOX(&vot::combine));
  library.impl("experts_backward", TORCH_BOX(&vot::backward));
  library.impl("experts_cache_backward", TORCH_BOX(&vot::cache_backward));
}
