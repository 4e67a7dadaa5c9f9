#include "segment_add.h"

#include "rows.h"
#include "scratch.h"
#include "sums.h"

namespace vot {
namespace VOT_ISA {
namespace {

constexpr int64_t ROWS = 64;  // of a task

template <class T, bool PAST_CACHE>
void add_rows(const SegmentAddForward& problem, int64_t begin, int64_t end) {
  const int64_t width = problem.width, packed = least<int64_t>(end, problem.bounds[problem.segments]);
  T* out = static_cast<T*>(problem.out);
  int64_t row = begin, segment = last_at_or_below(problem.bounds, problem.segments + 1, begin);
  for (; row < packed; row++) {
    while (problem.bounds[segment + 1] <= row) segment++;
    const T* x = static_cast<const T*>(problem.x) + row * problem.x_stride;
    const float* embedding = problem.embedding + segment * width;
    for_vectors<PAST_CACHE>(width, [&](int64_t i, auto part) {
      part.set(out + row * width + i, part.get(x + i) + part.get(embedding + i));
    });
  }
  clear(out + row * width, (end - row) * width);
}

// d_x = d_out for some rows of one segment, and their sum.
template <class T, bool PAST_CACHE>
void copy_and_sum(const T* d_out, int64_t stride, int64_t rows, int64_t width, T* d_x, float* total) {
  constexpr int VECTORS = 4;  // of a strip of columns: their sums are under way at a time
  int64_t c = 0;
  for (; c + VECTORS * LANES <= width; c += VECTORS * LANES) {
    CompensatedSum sums[VECTORS];
    for (int64_t r = 0; r < rows; r++)
      for (int v = 0; v < VECTORS; v++) {
        const int64_t column = c + v * LANES;
        const Vec x = load(d_out + r * stride + column);
        sums[v].add(x);
        Whole<PAST_CACHE>{}.set(d_x + r * width + column, x);
      }
    for (int v = 0; v < VECTORS; v++) store(total + c + v * LANES, sums[v].sum);
  }
  for_vectors<PAST_CACHE>(width - c, [&](int64_t i, auto part) {
    CompensatedSum sum;
    for (int64_t r = 0; r < rows; r++) {
      const Vec x = part.get(d_out + r * stride + c + i);
      sum.add(x);
      part.set(d_x + r * width + c + i, x);
    }
    part.set(total + c + i, sum.sum);
  });
}

template <class T, bool PAST_CACHE>
void run_backward(const SegmentAddBackward& problem, const Parallel& parallel) {
  const int64_t segments = problem.segments, width = problem.width;
  const int32_t* bounds = problem.bounds;
  // Segment s has the tasks from first_task[s] to before first_task[s + 1]. They begin with the segment, so that its
  // sum does not depend on its neighbours.
  int64_t* first_task = reinterpret_cast<int64_t*>(scratch<0>(size_t(2 * (segments + 1))));
  first_task[0] = 0;
  for (int64_t s = 0; s < segments; s++)
    first_task[s + 1] = first_task[s] + (bounds[s + 1] - bounds[s] + ROWS - 1) / ROWS;
  const int64_t tasks = first_task[segments];
  float* parts = scratch<1>(size_t(tasks * width));
  T* d_x = static_cast<T*>(problem.d_x);
  parallel(tasks, [&](int64_t task) {
    const int64_t segment = last_at_or_below(first_task, segments + 1, task);
    const int64_t begin = bounds[segment] + (task - first_task[segment]) * ROWS;
    const int64_t rows = least<int64_t>(ROWS, bounds[segment + 1] - begin);
    const T* d_out = static_cast<const T*>(problem.d_out) + begin * problem.d_out_stride;
    copy_and_sum<T, PAST_CACHE>(d_out, problem.d_out_stride, rows, width, d_x + begin * width, parts + task * width);
    finish_streams();
  });
  parallel(segments, [&](int64_t s) {
    sum_rows(parts + first_task[s] * width, first_task[s + 1] - first_task[s], width, problem.d_embedding + s * width);
  });
  const int64_t packed = bounds[segments];
  clear(d_x + packed * width, (problem.rows - packed) * width);
}

}  // namespace

void segment_add_forward(const SegmentAddForward& problem, const Parallel& parallel) {
  with_type_and_writes(problem.dtype, 1, problem.rows * problem.width, problem.width, [&](auto zero, auto past_cache) {
    parallel((problem.rows + ROWS - 1) / ROWS, [&](int64_t task) {
      const int64_t begin = task * ROWS;
      add_rows<decltype(zero), past_cache.value>(problem, begin, least(begin + ROWS, problem.rows));
      finish_streams();
    });
  });
}

void segment_add_backward(const SegmentAddBackward& problem, const Parallel& parallel) {
  with_type_and_writes(problem.dtype, 1, problem.rows * problem.width, problem.width, [&](auto zero, auto past_cache) {
    run_backward<decltype(zero), past_cache.value>(problem, parallel);
  });
}

}  // namespace VOT_ISA
}  // namespace vot
