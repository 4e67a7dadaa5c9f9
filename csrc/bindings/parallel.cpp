// The pool of torch as a `Parallel`.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

#include "binding.h"

namespace vot {
namespace {

// Each thread takes the next task as soon as it is done with one, because tasks differ in length.
void for_all(int64_t tasks, Parallel::Task run, const void* context) {
  const int64_t threads = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  if (threads <= 1) {
    for (int64_t task = 0; task < tasks; task++) run(context, task);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t task = next++; task < tasks; task = next++) run(context, task);
  });
}

}  // namespace

Parallel torch_threads() { return {for_all, int(torch::stable::get_num_threads())}; }

}  // namespace vot
