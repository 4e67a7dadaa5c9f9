// The way kernels run on threads. They know no thread library: whoever calls them hands one in.
#pragma once
#include <cstdint>

namespace vot {

struct Parallel {
  using Task = void (*)(const void* context, int64_t task);
  // Calls run(context, i) for every i from 0 to before `tasks`, on any thread and in any order, and returns after all.
  void (*for_all)(int64_t tasks, Task run, const void* context);
  int threads;  // how many tasks run at a time, at most

  // The same for a callable `body(i)`.
  template <class Body>
  void operator()(int64_t tasks, const Body& body) const {
    for_all(tasks, [](const void* context, int64_t task) { (*static_cast<const Body*>(context))(task); }, &body);
  }
};

}  // namespace vot
