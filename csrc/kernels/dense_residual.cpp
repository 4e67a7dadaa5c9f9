#include "dense_residual.h"

#include "scratch.h"
#include "simd.h"

namespace vot {
namespace VOT_ISA {

namespace {

constexpr int64_t CHUNK = 8192;   // numbers of a task: d_out's stay in the first cache while the states pass by
constexpr int VECTORS = 4;        // that are under way at a time, to hide the latency of a sum
constexpr int STEP = VECTORS * LANES;
constexpr int64_t BEYOND_CACHE = int64_t(1) << 21;  // numbers of a result that will have left the cache when it is read

template <class T>
VOT_INLINE void write(T* to, Vec x, bool past_cache) {
  past_cache ? stream(to, x) : store(to, x);
}

// out[i] for i from begin to before end.
template <class T>
void weighted_sum(const DenseResidualForward& problem, int64_t begin, int64_t end, bool past_cache) {
  const auto state = [&](int s) { return static_cast<const T*>(problem.states[s]); };
  T* out = static_cast<T*>(problem.out);
  int64_t i = begin;
  for (; i + STEP <= end; i += STEP) {
    Vec sums[VECTORS] = {};
    for (int s = 0; s < problem.count; s++)
      for (int v = 0; v < VECTORS; v++) sums[v] += load(state(s) + i + v * LANES) * splat(problem.weights[s]);
    for (int v = 0; v < VECTORS; v++) write(out + i + v * LANES, sums[v], past_cache);
  }
  for (; i < end; i += LANES) {
    const int rest = int(least<int64_t>(LANES, end - i));
    Vec total = {};
    for (int s = 0; s < problem.count; s++) total += load_part(state(s) + i, rest) * splat(problem.weights[s]);
    store_part(out + i, total, rest);
  }
}

// d_state = weight * d_out for `count` numbers. Returns their part of d_weight, the sum of d_out * state.
template <class T>
float state_gradient(const T* d_out, const T* state, float weight, int64_t count, T* d_state, bool past_cache) {
  Vec sums[VECTORS] = {};
  int64_t i = 0;
  for (; i + STEP <= count; i += STEP)
    for (int v = 0; v < VECTORS; v++) {
      const int64_t at = i + v * LANES;
      const Vec d = load(d_out + at);
      sums[v] += d * load(state + at);
      write(d_state + at, d * splat(weight), past_cache);
    }
  for (; i < count; i += LANES) {
    const int rest = int(least<int64_t>(LANES, count - i));
    const Vec d = load_part(d_out + i, rest);
    sums[0] += d * load_part(state + i, rest);
    store_part(d_state + i, d * splat(weight), rest);
  }
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

}  // namespace

void dense_residual_forward(const DenseResidualForward& problem, const Parallel& parallel) {
  const bool past_cache = problem.numbers >= BEYOND_CACHE;
  with_type(problem.dtype, [&](auto zero) {
    parallel((problem.numbers + CHUNK - 1) / CHUNK, [&](int64_t chunk) {
      const int64_t begin = chunk * CHUNK, end = least(begin + CHUNK, problem.numbers);
      weighted_sum<decltype(zero)>(problem, begin, end, past_cache);
      finish_streams();
    });
  });
}

// Each chunk writes down its parts of d_weights, which are added in the chunks' order, on whatever thread they ran.
void dense_residual_backward(const DenseResidualBackward& problem, const Parallel& parallel) {
  const int count = problem.count;
  const int64_t chunks = (problem.numbers + CHUNK - 1) / CHUNK;
  const bool past_cache = problem.numbers >= BEYOND_CACHE;
  float* parts = scratch(size_t(chunks * count));
  with_type(problem.dtype, [&](auto zero) {
    using T = decltype(zero);
    parallel(chunks, [&](int64_t chunk) {
      const int64_t begin = chunk * CHUNK, size = least(CHUNK, problem.numbers - begin);
      const T* d_out = static_cast<const T*>(problem.d_out) + begin;
      for (int s = 0; s < count; s++) {
        const T* state = static_cast<const T*>(problem.states[s]) + begin;
        T* d_state = static_cast<T*>(problem.d_states[s]) + begin;
        parts[chunk * count + s] = state_gradient(d_out, state, problem.weights[s], size, d_state, past_cache);
      }
      finish_streams();
    });
  });
  for (int s = 0; s < count; s++) {
    double total = 0;
    for (int64_t chunk = 0; chunk < chunks; chunk++) total += parts[chunk * count + s];
    problem.d_weights[s] = float(total);
  }
}

}  // namespace VOT_ISA
}  // namespace vot
