#include "group_states.h"

#include "head_blocks.h"
#include "scratch.h"
#include "tile.h"

namespace vot {
namespace VOT_ISA {
namespace {

constexpr int64_t SCAN_NUMBERS = 2048;  // numbers of a state that one task sums over the groups

// How the work is cut: parts of groups times blocks of heads. It does not depend on the number of threads.
struct Cut {
  const GroupStates& problem;
  HeadCut heads;
  int64_t size;            // floats of the states of all heads of a group
  const int64_t* first;    // [groups + 1], the first part of each group
  const int64_t* partial;  // [groups], where the parts of each group of several lie in `partials`
  float* partials;         // [...][size]
};

// total[width] += the sum of the rows' features, each times the appended column of its values.
void add_features(const GroupStates& problem, const float* features, int64_t begin, int rows, int head, float* total) {
  const int64_t width = round_up(problem.width, LANES);
  for (int64_t c = 0; c < width; c += LANES) {
    Vec sums = {};
    for (int r = 0; r < rows; r++) {
      const Vec x = load(features + r * width + c);
      sums += problem.last ? x * problem.last[(begin + r) * problem.heads + head] : x;
    }
    store(total + c, load(total + c) + sums);
  }
}

// The states of rows [begin, end) of a block of heads.
void sum_rows(const GroupStates& problem, int64_t begin, int64_t end, Heads keys, Heads heads, float* states) {
  const int repeats = heads.count / keys.count;
  const int64_t width = round_up(problem.width, LANES), head_dim = round_up(problem.head_dim, LANES);
  const int64_t row = state_row(problem.head_dim), size = problem.width * row;
  float* features = scratch<0>(size_t(heads.count * BLOCK_ROWS * (width + head_dim) + keys.count * width));
  float *values = features + heads.count * BLOCK_ROWS * width, *totals = values + heads.count * BLOCK_ROWS * head_dim;
  std::memset(totals, 0, size_t(keys.count * width) * sizeof(float));
  if (begin == end) std::memset(states, 0, size_t(keys.count * size) * sizeof(float));
  for (int64_t at = begin; at < end; at += BLOCK_ROWS) {
    const int rows = int(least<int64_t>(BLOCK_ROWS, end - at));
    load_features(problem.dtype, problem.map, problem.features, at, rows, heads, problem.width, features, problem.scale,
                  problem.weights, problem.heads);
    load_values(problem.dtype, problem.values, at, rows, heads, problem.head_dim, values);
    Fetch<2> fetch;
    const int64_t next = at + rows, next_end = least(next + BLOCK_ROWS, end);
    fetch_rows(problem.dtype, problem.features, next, next_end, heads, problem.width, fetch);
    fetch_rows(problem.dtype, problem.values, next, next_end, heads, problem.head_dim, fetch);
    for (int h = 0; h < heads.count; h++) {
      const float* own = features + h * BLOCK_ROWS * width;
      const Right right{values + h * BLOCK_ROWS * head_dim, head_dim};
      const Old old = at == begin && h % repeats == 0 ? Old::CLEAR : Old::KEEP;
      const Result state{states + h / repeats * size, row};
      multiply(problem.width, int(head_dim), Left{own, 1, width}, right, rows, state, old, nullptr, fetch);
      add_features(problem, own, at, rows, heads.first + h, totals + h / repeats * width);
    }
  }
  for (int h = 0; h < keys.count; h++) finish_state(problem.width, problem.head_dim, totals + h * width, states + h * size);
}

// The group that a part belongs to.
int64_t group_of(const Cut& cut, int64_t part) {
  int64_t low = 0, high = cut.problem.groups;  // first[low] <= part < first[high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (cut.first[middle] <= part ? low : high) = middle;
  }
  return low;
}

void sum_part(const Cut& cut, int64_t task) {
  const GroupStates& problem = cut.problem;
  const int64_t part = task / cut.heads.blocks(), block = task % cut.heads.blocks(), group = group_of(cut, part);
  const int64_t begin = problem.begins[group], rows = problem.ends[group] - begin;
  const int64_t place = part - cut.first[group], parts = cut.first[group + 1] - cut.first[group];
  const Heads keys = cut.heads.keys(block);
  float* states = parts == 1 ? problem.states + group * cut.size : cut.partials + (cut.partial[group] + place) * cut.size;
  sum_rows(problem, begin + rows * place / parts, begin + rows * (place + 1) / parts, keys, cut.heads.queries(block),
              states + keys.first * (cut.size / problem.kv_heads));
}

// Numbers [begin, end) of the sum of `count` states, in their order.
void add_states(const float* states, int64_t count, int64_t size, int64_t begin, int64_t end, float* sum) {
  for (int64_t i = begin; i < end; i += LANES) {
    Vec total = {};
    for (int64_t g = 0; g < count; g++) total += load(states + g * size + i);
    store(sum + i, total);
  }
}

// Sums in float64, as wide as a vector of floats in bytes.
typedef float HalfVec __attribute__((vector_size(VOT_VECTOR_BYTES / 2)));
typedef float UnalignedHalfVec __attribute__((vector_size(VOT_VECTOR_BYTES / 2), aligned(4), may_alias));
typedef double DoubleVec __attribute__((vector_size(VOT_VECTOR_BYTES)));
constexpr int DOUBLE_LANES = LANES / 2;

VOT_INLINE HalfVec half_vector(const float* from) { return *reinterpret_cast<const UnalignedHalfVec*>(from); }

// Sums over more and more states, for numbers [begin, end) of them.
class RunningSum {
 public:
  RunningSum(int64_t begin, int64_t end) : begin_(begin), end_(end) {}

  void add(const float* state) {
    each([&](int64_t c, DoubleVec& total) { total += __builtin_convertvector(half_vector(state + c), DoubleVec); });
  }
  void put(float* target, bool keep) {
    each([&](int64_t c, const DoubleVec& total) {
      const HalfVec sum = __builtin_convertvector(total, HalfVec);
      *reinterpret_cast<UnalignedHalfVec*>(target + c) = keep ? half_vector(target + c) + sum : sum;
    });
  }

 private:
  template <class Visit>
  VOT_INLINE void each(const Visit& visit) {
    for (int64_t c = begin_; c < end_; c += DOUBLE_LANES) visit(c, totals_[(c - begin_) / DOUBLE_LANES]);
  }

  const int64_t begin_, end_;
  DoubleVec totals_[SCAN_NUMBERS / DOUBLE_LANES] = {};
};

}  // namespace

void group_states(const GroupStates& problem, const Parallel& parallel) {
  const int64_t size = problem.kv_heads * problem.width * state_row(problem.head_dim);
  int64_t* first = reinterpret_cast<int64_t*>(scratch<1>(size_t(2 * problem.groups + 1) * 2));
  int64_t *partial = first + problem.groups + 1, count = 0;
  first[0] = 0;
  for (int64_t g = 0; g < problem.groups; g++) {
    const int64_t parts = parts_of_rows(problem.ends[g] - problem.begins[g]);
    first[g + 1] = first[g] + parts;
    partial[g] = count;
    if (parts > 1) count += parts;
  }
  float* partials = count ? scratch<2>(size_t(count * size)) : nullptr;
  const HeadCut heads(problem.heads, problem.kv_heads, most(problem.width, problem.head_dim));
  const Cut cut{problem, heads, size, first, partial, partials};
  parallel(first[problem.groups] * heads.blocks(), [&](int64_t task) { sum_part(cut, task); });
  if (!count) return;
  const int64_t blocks = (size + SCAN_NUMBERS - 1) / SCAN_NUMBERS;
  parallel(problem.groups * blocks, [&](int64_t task) {
    const int64_t group = task / blocks, begin = task % blocks * SCAN_NUMBERS, parts = first[group + 1] - first[group];
    if (parts > 1)
      add_states(partials + partial[group] * size, parts, size, begin, least(begin + SCAN_NUMBERS, size),
                 problem.states + group * size);
  });
}

void segment_states(const SegmentStates& problem, const Parallel& parallel) {
  const int64_t size = problem.size, blocks = (size + SCAN_NUMBERS - 1) / SCAN_NUMBERS;
  parallel(problem.segments * blocks, [&](int64_t task) {
    const int64_t segment = task / blocks, begin = task % blocks * SCAN_NUMBERS;
    const int64_t first = problem.bounds[segment], count = problem.bounds[segment + 1] - first;
    add_states(problem.states + first * size, count, size, begin, least(begin + SCAN_NUMBERS, size),
               problem.sums + segment * size);
  });
}

void far_states(const FarStates& problem, const Parallel& parallel) {
  const int64_t blocks = (problem.size + SCAN_NUMBERS - 1) / SCAN_NUMBERS;
  parallel(problem.segments * blocks, [&](int64_t task) {
    const int64_t segment = task / blocks, begin = task % blocks * SCAN_NUMBERS;
    const int64_t end = least(begin + SCAN_NUMBERS, problem.size);
    const int64_t first = problem.bounds[segment], last = problem.bounds[segment + 1];
    const auto state = [&](int64_t g) { return problem.states + g * problem.size; };
    const auto sum = [&](int64_t g) { return problem.sums + g * problem.size; };
    if (problem.before) {
      RunningSum total(begin, end);
      for (int64_t g = first, next = first; g < last; g++) {
        while (next < problem.before[g]) total.add(state(next++));
        total.put(sum(g), false);
      }
    }
    if (problem.after) {
      RunningSum total(begin, end);
      for (int64_t g = last - 1, next = last; g >= first; g--) {
        while (next > problem.after[g]) total.add(state(--next));
        total.put(sum(g), problem.before != nullptr);
      }
    }
  });
}

}  // namespace VOT_ISA
}  // namespace vot
