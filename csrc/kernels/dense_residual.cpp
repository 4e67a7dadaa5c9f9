#include "dense_residual.h"

#include "rows.h"
#include "scratch.h"
#include "simd.h"
#include "sums.h"

namespace vot {
namespace VOT_ISA {

namespace {

constexpr int64_t CHUNK = 8192;   // numbers of a task: d_out's stay in the first cache while the states pass by
constexpr int VECTORS = 4;        // that are under way at a time, to hide the latency of a sum
constexpr int STEP = VECTORS * LANES;

// out[i] for i from begin to before end.
template <class T, bool PAST_CACHE>
void weighted_sum(const DenseResidualForward& problem, int64_t begin, int64_t end) {
  const auto state = [&](int s) { return static_cast<const T*>(problem.states[s]); };
  T* out = static_cast<T*>(problem.out);
  int64_t i = begin;
  for (; i + STEP <= end; i += STEP) {
    Vec sums[VECTORS] = {};
    for (int s = 0; s < problem.count; s++)
      for (int v = 0; v < VECTORS; v++) sums[v] += load(state(s) + i + v * LANES) * splat(problem.weights[s]);
    for (int v = 0; v < VECTORS; v++) Whole<PAST_CACHE>{}.set(out + i + v * LANES, sums[v]);
  }
  for_vectors<false>(end - i, [&](int64_t j, auto part) {
    Vec total = {};
    for (int s = 0; s < problem.count; s++) total += part.get(state(s) + i + j) * splat(problem.weights[s]);
    part.set(out + i + j, total);
  });
}

// d_state = weight * d_out for `count` numbers. Returns their part of d_weight, the sum of d_out * state.
template <class T, bool PAST_CACHE>
float state_gradient(const T* d_out, const T* state, float weight, int64_t count, T* d_state) {
  Vec sums[VECTORS] = {};
  int64_t i = 0;
  for (; i + STEP <= count; i += STEP)
    for (int v = 0; v < VECTORS; v++) {
      const int64_t at = i + v * LANES;
      const Vec d = load(d_out + at);
      sums[v] += d * load(state + at);
      Whole<PAST_CACHE>{}.set(d_state + at, d * splat(weight));
    }
  for_vectors<false>(count - i, [&](int64_t j, auto part) {
    const Vec d = part.get(d_out + i + j);
    sums[0] += d * part.get(state + i + j);
    part.set(d_state + i + j, d * splat(weight));
  });
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

}  // namespace

void dense_residual_forward(const DenseResidualForward& problem, const Parallel& parallel) {
  with_type_and_writes(problem.dtype, 1, problem.numbers, CHUNK, [&](auto zero, auto past_cache) {
    parallel((problem.numbers + CHUNK - 1) / CHUNK, [&](int64_t chunk) {
      const int64_t begin = chunk * CHUNK, end = least(begin + CHUNK, problem.numbers);
      weighted_sum<decltype(zero), past_cache.value>(problem, begin, end);
      finish_streams();
    });
  });
}

// Each chunk writes down its parts of d_weights, which are added in the chunks' order, on whatever thread they ran.
void dense_residual_backward(const DenseResidualBackward& problem, const Parallel& parallel) {
  const int count = problem.count;
  const int64_t chunks = (problem.numbers + CHUNK - 1) / CHUNK;
  float* parts = scratch(size_t(chunks * count));
  with_type_and_writes(problem.dtype, count, problem.numbers, CHUNK, [&](auto zero, auto past_cache) {
    using T = decltype(zero);
    parallel(chunks, [&](int64_t chunk) {
      const int64_t begin = chunk * CHUNK, size = least(CHUNK, problem.numbers - begin);
      const T* d_out = static_cast<const T*>(problem.d_out) + begin;
      for (int s = 0; s < count; s++) {
        const T* state = static_cast<const T*>(problem.states[s]) + begin;
        T* d_state = static_cast<T*>(problem.d_states[s]) + begin;
        parts[chunk * count + s] =
            state_gradient<T, past_cache.value>(d_out, state, problem.weights[s], size, d_state);
      }
      finish_streams();
    });
  });
  sum_rows(parts, chunks, count, problem.d_weights);
}

}  // namespace VOT_ISA
}  // namespace vot
