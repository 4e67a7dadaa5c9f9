#include "rope_qk_norm.h"

#include "rows.h"
#include "scratch.h"
#include "sin_cos.h"
#include "sums.h"

namespace vot {
namespace VOT_ISA {
namespace {

constexpr int64_t TOKENS = 16;  // of a task

template <class T>
const T* head_at(const Heads& x, int64_t token, int64_t head) {
  return static_cast<const T*>(x.data) + token * x.token_stride + head * x.head_stride;
}

// By how much the pairs of one token turn.
struct Rotation {
  const float *cosines, *sines;
};

// The rotation of a token, in `to`, which has space for three times the pairs, each rounded up to vectors.
template <class Problem>
Rotation rotation_of(const Problem& problem, int64_t token, float* to) {
  const int64_t pairs = problem.head_dim / 2, space = round_up(pairs, LANES);
  float *cosines = to, *sines = to + space, *angles = to + 2 * space;
  const float* position = problem.positions + 3 * token;
  for (int64_t i = 0; i < pairs; i++) angles[i] = position[problem.axes[i]] * problem.frequencies[i];
  for (int64_t i = pairs; i < space; i++) angles[i] = 0;
  for (int64_t i = 0; i < space; i += LANES) {
    Vec sine, cosine;
    sin_cos(load(angles + i), &sine, &cosine);
    store(cosines + i, cosine);
    store(sines + i, sine);
  }
  return {cosines, sines};
}

// 1 / sqrt(mean of x^2 + eps)
template <class T>
float rms_scale(const T* x, int64_t head_dim, float eps) {
  Vec squares = {};
  for_vectors<false>(head_dim, [&](int64_t i, auto part) {
    const Vec numbers = part.get(x + i);
    squares += numbers * numbers;
  });
  return 1 / sqrtf(sum(squares) / float(head_dim) + eps);
}

template <class T, bool PAST_CACHE>
void turn_head(const T* x, const float* weight, int64_t head_dim, float eps, Rotation rotation, T* out) {
  const int64_t half = head_dim / 2;
  const float scale = weight ? rms_scale(x, head_dim, eps) : 1;
  for_vectors<PAST_CACHE>(half, [&](int64_t i, auto part) {
    Vec first = part.get(x + i), second = part.get(x + half + i);
    if (weight) {
      first *= splat(scale) * part.get(weight + i);
      second *= splat(scale) * part.get(weight + half + i);
    }
    const Vec cosine = part.get(rotation.cosines + i), sine = part.get(rotation.sines + i);
    part.set(out + i, first * cosine - second * sine);
    part.set(out + half + i, first * sine + second * cosine);
  });
}

// The gradient of a head without a weight: it is turned back.
template <bool PAST_CACHE, class T, class Out>
void turn_back(const T* d_out, int64_t half, Rotation rotation, Out* to) {
  for_vectors<PAST_CACHE>(half, [&](int64_t i, auto part) {
    const Vec first = part.get(d_out + i), second = part.get(d_out + half + i);
    const Vec cosine = part.get(rotation.cosines + i), sine = part.get(rotation.sines + i);
    part.set(to + i, first * cosine + second * sine);
    part.set(to + half + i, second * cosine - first * sine);
  });
}

// With a weight: d_x = scale * (g - unit * mean(g * unit)), where unit = scale * x and g = weight * d_out turned back.
// d_weight grows by unit * d_out turned back. `space` is for two heads.
template <bool PAST_CACHE, class T>
void norm_gradient(const T* d_out, const T* x, const float* weight, int64_t head_dim, float eps, Rotation rotation,
                   float* space, float* d_weight, T* d_x) {
  float *gradients = space, *units = space + head_dim;
  const Vec scale = splat(rms_scale(x, head_dim, eps));
  turn_back<false>(d_out, head_dim / 2, rotation, gradients);
  Vec products = {};
  for_vectors<false>(head_dim, [&](int64_t i, auto part) {
    const Vec unit = part.get(x + i) * scale, turned = part.get(gradients + i), g = turned * part.get(weight + i);
    part.set(d_weight + i, part.get(d_weight + i) + turned * unit);
    products += g * unit;
    part.set(units + i, unit);
    part.set(gradients + i, g);
  });
  const Vec mean = splat(sum(products) / float(head_dim));
  for_vectors<PAST_CACHE>(head_dim, [&](int64_t i, auto part) {
    part.set(d_x + i, scale * (part.get(gradients + i) - part.get(units + i) * mean));
  });
}

// One token of q, or of k. The heads' parts of d_weight are added before they go to those of the other tokens.
template <class T, bool PAST_CACHE>
void token_gradient(const RopeQkNormBackward& problem, const RopeQkNormBackward::Side& side, int64_t token,
                    Rotation rotation, float* space, float* d_weight) {
  const int64_t d = problem.head_dim;
  float* token_sum = space + 2 * d;
  std::memset(token_sum, 0, size_t(d) * 4);
  for (int64_t head = 0; head < side.heads; head++) {
    const T* d_out = head_at<T>(side.d_out, token, head);
    T* d_x = static_cast<T*>(side.d_x) + (token * side.heads + head) * d;
    if (!side.weight)
      turn_back<PAST_CACHE>(d_out, d / 2, rotation, d_x);
    else
      norm_gradient<PAST_CACHE>(d_out, head_at<T>(side.x, token, head), side.weight, d, problem.eps, rotation, space,
                                token_sum, d_x);
  }
  for_vectors<false>(d, [&](int64_t i, auto part) {
    part.set(d_weight + i, part.get(d_weight + i) + part.get(token_sum + i));
  });
}

int64_t tasks_of(int64_t packed) { return (packed + TOKENS - 1) / TOKENS; }

// Zeros for the tokens that have no position.
template <class T>
void clear_slack(void* x, int64_t packed, int64_t tokens, int64_t numbers_per_token) {
  clear(static_cast<T*>(x) + packed * numbers_per_token, (tokens - packed) * numbers_per_token);
}

template <class T, bool PAST_CACHE>
void run_forward(const RopeQkNormForward& problem, const Parallel& parallel) {
  const int64_t d = problem.head_dim;
  parallel(tasks_of(problem.packed), [&](int64_t task) {
    float* table = scratch(size_t(3 * round_up(d / 2, LANES)));
    const int64_t end = least((task + 1) * TOKENS, problem.packed);
    for (int64_t token = task * TOKENS; token < end; token++) {
      const Rotation rotation = rotation_of(problem, token, table);
      for (const auto& side : problem.sides)
        for (int64_t head = 0; head < side.heads; head++) {
          T* out = static_cast<T*>(side.out) + (token * side.heads + head) * d;
          turn_head<T, PAST_CACHE>(head_at<T>(side.x, token, head), side.weight, d, problem.eps, rotation, out);
        }
    }
    finish_streams();
  });
  for (const auto& side : problem.sides) clear_slack<T>(side.out, problem.packed, problem.tokens, side.heads * d);
}

template <class T, bool PAST_CACHE>
void run_backward(const RopeQkNormBackward& problem, const Parallel& parallel) {
  const int64_t d = problem.head_dim, tasks = tasks_of(problem.packed), table = 3 * round_up(d / 2, LANES);
  float* parts = scratch<0>(size_t(2 * tasks * d));  // of d_weight, [side, task, head_dim]
  parallel(tasks, [&](int64_t task) {
    float *rotations = scratch<1>(size_t(table + 3 * d)), *space = rotations + table;
    for (int side = 0; side < 2; side++) std::memset(parts + (side * tasks + task) * d, 0, size_t(d) * 4);
    const int64_t end = least((task + 1) * TOKENS, problem.packed);
    for (int64_t token = task * TOKENS; token < end; token++) {
      const Rotation rotation = rotation_of(problem, token, rotations);
      for (int side = 0; side < 2; side++)
        token_gradient<T, PAST_CACHE>(problem, problem.sides[side], token, rotation, space,
                                      parts + (side * tasks + task) * d);
    }
    finish_streams();
  });
  for (int i = 0; i < 2; i++) {
    const auto& side = problem.sides[i];
    if (side.weight) sum_rows(parts + i * tasks * d, tasks, d, side.d_weight);
    clear_slack<T>(side.d_x, problem.packed, problem.tokens, side.heads * d);
  }
}

template <class Problem>
int64_t most_numbers(const Problem& problem) {
  return problem.tokens * most(problem.sides[0].heads, problem.sides[1].heads) * problem.head_dim;
}

}  // namespace

void rope_qk_norm_forward(const RopeQkNormForward& problem, const Parallel& parallel) {
  with_type_and_writes(problem.dtype, 2, most_numbers(problem), problem.head_dim / 2, [&](auto zero, auto past_cache) {
    run_forward<decltype(zero), past_cache.value>(problem, parallel);
  });
}

void rope_qk_norm_backward(const RopeQkNormBackward& problem, const Parallel& parallel) {
  with_type_and_writes(problem.dtype, 2, most_numbers(problem), problem.head_dim / 2, [&](auto zero, auto past_cache) {
    run_backward<decltype(zero), past_cache.value>(problem, parallel);
  });
}

}  // namespace VOT_ISA
}  // namespace vot
