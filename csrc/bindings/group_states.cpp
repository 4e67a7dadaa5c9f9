#include "head_rows.h"

namespace vot {
namespace {

// `ranges` is [2, groups].
void group_states(const Tensor& features, const Tensor& values, const MaybeTensor& weights, const MaybeTensor& last,
                  const Tensor& ranges, int64_t feature_map, const Tensor& states) {
  GroupStates problem = {};
  problem.dtype = dtype_of(values);
  problem.map = FeatureMap(feature_map);
  problem.features = rows(features);
  problem.values = rows(values);
  problem.heads = int(features.size(1));
  problem.kv_heads = int(states.size(1));
  problem.width = int(features.size(2));
  problem.head_dim = int(values.size(2));
  problem.weights = in<float>(weights);
  problem.last = in<float>(last);
  problem.scale = 1;
  problem.groups = states.size(0);
  problem.begins = in<int32_t>(ranges);
  problem.ends = problem.begins + ranges.stride(0);
  problem.states = out<float>(states);
  kernels().group_states(problem, torch_threads());
}

void far_states(const Tensor& states, const Tensor& bounds, const MaybeTensor& before, const MaybeTensor& after,
                const Tensor& sums) {
  FarStates problem = {};
  problem.states = in<float>(states);
  problem.size = states.stride(0);
  problem.segments = bounds.size(0) - 1;
  problem.bounds = in<int32_t>(bounds);
  problem.before = in<int32_t>(before);
  problem.after = in<int32_t>(after);
  problem.sums = out<float>(sums);
  kernels().far_states(problem, torch_threads());
}

}  // namespace
}  // namespace vot

STABLE_TORCH_LIBRARY_FRAGMENT(vot_kernels_cpp, library) {
  library.def(
      "group_states(Tensor features, Tensor values, Tensor? weights, Tensor? last, Tensor ranges, int feature_map, "
      "Tensor(a!) states) -> ()");
  library.def("far_states(Tensor states, Tensor bounds, Tensor? before, Tensor? after, Tensor(a!) sums) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(vot_kernels_cpp, CPU, library) {
  library.impl("group_states", TORCH_BOX(&vot::group_states));
  library.impl("far_states", TORCH_BOX(&vot::far_states));
}
