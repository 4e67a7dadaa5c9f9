#include "head_rows.h"

namespace vot {
namespace {

FarRows far_rows(const MaybeTensor& states, const MaybeTensor& slots, const MaybeTensor& features,
                 int64_t feature_map) {
  const int width = features ? int(features->size(2)) : 0;
  return {in<float>(states), in<int32_t>(slots), head_rows(features), FeatureMap(feature_map), width};
}

FarPairs far_pairs(const MaybeTensor& reach, const MaybeTensor& features) {
  if (!reach) return {};
  const int32_t* low = in<int32_t>(*reach);
  return {low, low + reach->stride(0), head_rows(features)};
}

// `ranges` and `reach` are [2, rows]; tasks, here and below, are rows of numbers as their struct has them.
void range_attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& ranges,
                             const Tensor& tasks, double scale, const MaybeTensor& states, const MaybeTensor& slots,
                             const MaybeTensor& features, int64_t feature_map, const MaybeTensor& reach,
                             const MaybeTensor& key_features, const MaybeTensor& beta, const Tensor& result,
                             const Tensor& lse) {
  RangeForward problem = {};
  problem.q = head_rows(q);
  problem.k = head_rows(k);
  problem.v = head_rows(v);
  problem.out = head_rows(result);
  problem.lse = out<float>(lse);
  problem.heads = int(q.size(1));
  problem.kv_heads = int(k.size(1));
  problem.head_dim = int(q.size(2));
  problem.scale = float(scale);
  problem.low = in<int32_t>(ranges);
  problem.high = problem.low + ranges.stride(0);
  problem.tasks = in<RowsTask>(tasks);
  problem.num_tasks = tasks.size(0);
  problem.far = far_rows(states, slots, features, feature_map);
  problem.pairs = far_pairs(reach, key_features);
  problem.beta = in<float>(beta);
  kernels().range_attention_forward(problem, torch_threads());
}

void range_attention_rows_backward(const Tensor& d_out, const MaybeTensor& d_lse, const Tensor& result,
                                   const Tensor& lse, int64_t kv_heads, const Tensor& tasks, const MaybeTensor& states,
                                   const MaybeTensor& slots, const MaybeTensor& features, int64_t feature_map,
                                   const MaybeTensor& beta, const Tensor& delta, const MaybeTensor& far_weight,
                                   const MaybeTensor& d_beta, const MaybeTensor& d_features) {
  RangeRowsBackward problem = {};
  problem.d_out = head_rows(d_out);
  problem.out = head_rows(result);
  problem.lse = in<float>(lse);
  problem.d_lse = in<float>(d_lse);
  problem.delta = out<float>(delta);
  problem.heads = int(d_out.size(1));
  problem.kv_heads = int(kv_heads);
  problem.head_dim = int(d_out.size(2));
  problem.tasks = in<RowsTask>(tasks);
  problem.num_tasks = tasks.size(0);
  problem.far = far_rows(states, slots, features, feature_map);
  problem.beta = in<float>(beta);
  problem.far_weight = out<float>(far_weight);
  problem.d_beta = out<float>(d_beta);
  problem.d_features = head_rows(d_features);
  kernels().range_attention_rows_backward(problem, torch_threads());
}

void range_attention_keys_backward(const Tensor& d_out, const Tensor& lse, const Tensor& delta, const Tensor& q,
                                   const Tensor& k, const Tensor& v, const Tensor& ranges, const Tensor& tasks,
                                   double scale, const MaybeTensor& begun, const MaybeTensor& states,
                                   const MaybeTensor& slots, const MaybeTensor& features, int64_t feature_map, const MaybeTensor& reach,
                                   const MaybeTensor& row_features, const MaybeTensor& far_weight, const Tensor& dq,
                                   const Tensor& dk, const Tensor& dv, const MaybeTensor& d_features,
                                   const MaybeTensor& d_beta, const MaybeTensor& d_q_features) {
  RangeKeysBackward problem = {};
  problem.d_out = head_rows(d_out);
  problem.q = head_rows(q);
  problem.k = head_rows(k);
  problem.v = head_rows(v);
  problem.dk = head_rows(dk);
  problem.dv = head_rows(dv);
  problem.lse = in<float>(lse);
  problem.delta = in<float>(delta);
  problem.begun = in<float>(begun);
  problem.dq = out<float>(dq);
  problem.rows = q.size(0);
  problem.heads = int(q.size(1));
  problem.kv_heads = int(k.size(1));
  problem.head_dim = int(q.size(2));
  problem.scale = float(scale);
  problem.low = in<int32_t>(ranges);
  problem.high = problem.low + ranges.stride(0);
  problem.tasks = in<KeysTask>(tasks);
  problem.num_tasks = tasks.size(0);
  problem.far = far_rows(states, slots, features, feature_map);
  problem.d_features = head_rows(d_features);
  problem.pairs = far_pairs(reach, row_features);
  problem.far_weight = in<float>(far_weight);
  problem.d_beta = out<float>(d_beta);
  problem.d_q_features = out<float>(d_q_features);
  kernels().range_attention_keys_backward(problem, torch_threads());
}

void range_attention_sum_parts(const MaybeTensor& begun, const Tensor& parts, const Tensor& tasks, const Tensor& dq) {
  RangeSumParts problem = {};
  problem.begun = in<float>(begun);
  problem.parts = in<float>(parts);
  problem.dq = head_rows(dq);
  problem.rows = dq.size(0);
  problem.heads = int(dq.size(1));
  problem.head_dim = int(dq.size(2));
  problem.tasks = in<SumTask>(tasks);
  problem.num_tasks = tasks.size(0);
  kernels().range_attention_sum_parts(problem, torch_threads());
}

}  // namespace
}  // namespace vot

STABLE_TORCH_LIBRARY_FRAGMENT(vot_kernels_cpp, library) {
  library.def(
      "range_attention_forward(Tensor q, Tensor k, Tensor v, Tensor ranges, Tensor tasks, float scale, "
      "Tensor? states, Tensor? slots, Tensor? features, int feature_map, Tensor? reach, Tensor? key_features, "
      "Tensor? beta, Tensor(a!) out, Tensor(b!) lse) -> ()");
  library.def(
      "range_attention_rows_backward(Tensor d_out, Tensor? d_lse, Tensor out, Tensor lse, int kv_heads, "
      "Tensor tasks, Tensor? states, Tensor? slots, Tensor? features, int feature_map, Tensor? beta, "
      "Tensor(a!) delta, Tensor(b!)? far_weight, Tensor(c!)? d_beta, Tensor(d!)? d_features) -> ()");
  library.def(
      "range_attention_keys_backward(Tensor d_out, Tensor lse, Tensor delta, Tensor q, Tensor k, Tensor v, "
      "Tensor ranges, Tensor tasks, float scale, Tensor? begun, Tensor? states, Tensor? slots, Tensor? features, "
      "int feature_map, Tensor? reach, Tensor? row_features, Tensor? far_weight, Tensor(a!) dq, Tensor(b!) dk, "
      "Tensor(c!) dv, Tensor(d!)? d_features, Tensor(e!)? d_beta, Tensor(f!)? d_q_features) -> ()");
  library.def(
      "range_attention_sum_parts(Tensor? begun, Tensor parts, Tensor tasks, Tensor(a!) dq) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(vot_kernels_cpp, CPU, library) {
  library.impl("range_attention_forward", TORCH_BOX(&vot::range_attention_forward));
  library.impl("range_attention_rows_backward", TORCH_BOX(&vot::range_attention_rows_backward));
  library.impl("range_attention_keys_backward", TORCH_BOX(&vot::range_attention_keys_backward));
  library.impl("range_attention_sum_parts", TORCH_BOX(&vot::range_attention_sum_parts));
}
