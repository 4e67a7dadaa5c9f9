#include "group_states.h"

#include "scratch.h"
#include "tile.h"

namespace vot {
namespace VOT_ISA {
namespace {

constexpr int BLOCK_ROWS = 64;         // rows whose features lie in the cache while they are summed
constexpr int64_t PART_ROWS = 512;     // a long group is summed in parts of about as many rows
constexpr int64_t MOST_PARTS = 32;     // but not more than this
constexpr int64_t ROW_NUMBERS = 512;   // numbers of a row that are read at a time: as many heads as these hold
constexpr int64_t SCAN_NUMBERS = 2048;  // numbers of a state that one task sums over the groups

int64_t parts_of(int64_t rows) { return most<int64_t>(1, least(rows / PART_ROWS, MOST_PARTS)); }

// How the work is cut: parts of groups times blocks of heads. It does not depend on the number of threads.
struct Cut {
  const GroupStates& problem;
  int64_t size;          // floats of the states of all heads of a group
  const int64_t* first;  // [groups + 1], the first part of each group
  float* partials;       // [parts][size], of groups of several parts
  int kv_heads_at_once, head_blocks;
};

// One block of rows of a block of heads: features [head][BLOCK_ROWS][width] and values [head][BLOCK_ROWS][head_dim],
// rows padded to whole vectors.
struct Block {
  const GroupStates& problem;
  int first_head, heads;
  int64_t width, head_dim;  // padded
  float *features, *values;

  float* features_of(int head) const { return features + head * BLOCK_ROWS * width; }
  float* values_of(int head) const { return values + head * BLOCK_ROWS * head_dim; }
  int64_t place(int64_t token, int head) const { return token * problem.heads + first_head + head; }

  // Reads rows as they lie: all heads of one, then the next.
  template <class T>
  void load_rows(int64_t begin, int rows) const {
    for (int r = 0; r < rows; r++)
      for (int h = 0; h < heads; h++) {
        float* out = features_of(h) + r * width;
        feature_row(problem.map, problem.features.at<T>(begin + r, first_head + h), problem.width, out);
        const float weight = problem.scale * (problem.weights ? problem.weights[place(begin + r, h)] : 1);
        if (weight != 1)
          for (int64_t c = 0; c < width; c += LANES) store(out + c, load(out + c) * weight);
        copy_row(problem.values.at<T>(begin + r, first_head + h), problem.head_dim, values_of(h) + r * head_dim);
      }
  }

  // Adds the rows' features, times the appended column, to `total` [width].
  void add_last(int64_t begin, int rows, int head, float* total) const {
    for (int64_t c = 0; c < width; c += LANES) {
      Vec sums = {};
      for (int r = 0; r < rows; r++) {
        const Vec x = load(features_of(head) + r * width + c);
        sums += problem.last ? x * problem.last[place(begin + r, head)] : x;
      }
      store(total + c, load(total + c) + sums);
    }
  }
};

// The state of rows [begin, end), for the key heads from `kv_head` on.
template <class T>
void sum_rows(const GroupStates& problem, int64_t begin, int64_t end, int kv_head, int kv_heads, float* states) {
  const int repeats = problem.heads / problem.kv_heads, heads = kv_heads * repeats;
  const int64_t width = round_up(problem.width, LANES), head_dim = round_up(problem.head_dim, LANES);
  const int64_t row = state_row(problem.head_dim), size = problem.width * row;
  float* features = scratch<0>(size_t(heads * BLOCK_ROWS * (width + head_dim) + kv_heads * width));
  float* totals = features + heads * BLOCK_ROWS * (width + head_dim);
  const Block block{problem, kv_head * repeats, heads, width, head_dim, features, features + heads * BLOCK_ROWS * width};
  std::memset(totals, 0, size_t(kv_heads * width) * sizeof(float));
  if (begin == end) std::memset(states, 0, size_t(kv_heads * size) * sizeof(float));
  for (int64_t at = begin; at < end; at += BLOCK_ROWS) {
    const int rows = int(least<int64_t>(BLOCK_ROWS, end - at));
    block.load_rows<T>(at, rows);
    for (int h = 0; h < heads; h++) {
      const Left transposed{block.features_of(h), 1, width};
      const Right values{block.values_of(h), head_dim};
      const Old old = at == begin && h % repeats == 0 ? Old::CLEAR : Old::KEEP;
      multiply(problem.width, int(head_dim), transposed, values, rows, Result{states + h / repeats * size, row}, old);
      block.add_last(at, rows, h, totals + h / repeats * width);
    }
  }
  for (int h = 0; h < kv_heads; h++)
    for (int f = 0; f < problem.width; f++) {
      float* tail = states + h * size + f * row + problem.head_dim;
      tail[0] = totals[h * width + f];
      for (int64_t c = 1; c < row - problem.head_dim; c++) tail[c] = 0;
    }
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

template <class T>
void sum_part(const Cut& cut, int64_t task) {
  const GroupStates& problem = cut.problem;
  const int64_t part = task / cut.head_blocks, group = group_of(cut, part), parts = cut.first[group + 1] - cut.first[group];
  const int64_t begin = problem.begins[group], rows = problem.ends[group] - begin, place = part - cut.first[group];
  const int kv_head = int(task % cut.head_blocks) * cut.kv_heads_at_once;
  const int kv_heads = least(cut.kv_heads_at_once, problem.kv_heads - kv_head);
  float* states = (parts == 1 ? problem.states + group * cut.size : cut.partials + part * cut.size) +
                  kv_head * (cut.size / problem.kv_heads);
  sum_rows<T>(problem, begin + rows * place / parts, begin + rows * (place + 1) / parts, kv_head, kv_heads, states);
}

// The states of groups of several parts, in the order of the parts.
void add_parts(const Cut& cut, int64_t group, int64_t begin, int64_t end) {
  const int64_t first = cut.first[group], stop = cut.first[group + 1];
  if (stop - first == 1) return;
  for (int64_t i = begin; i < end; i += LANES) {
    Vec total = load(cut.partials + first * cut.size + i);
    for (int64_t part = first + 1; part < stop; part++) total += load(cut.partials + part * cut.size + i);
    store(cut.problem.states + group * cut.size + i, total);
  }
}

// Sums in float64, as wide as a vector of floats in bytes.
typedef float HalfVec __attribute__((vector_size(VOT_VECTOR_BYTES / 2)));
typedef float UnalignedHalfVec __attribute__((vector_size(VOT_VECTOR_BYTES / 2), aligned(4), may_alias));
typedef double DoubleVec __attribute__((vector_size(VOT_VECTOR_BYTES)));
constexpr int DOUBLE_LANES = LANES / 2;

// target[g] (+)= the sum of the states `lag` and more groups before g, or after it, for numbers [begin, end) of a state.
void scan(const FarStates& problem, int64_t segment, int64_t lag, bool reverse, bool add, int64_t begin, int64_t end) {
  const int64_t first = problem.bounds[segment], count = problem.bounds[segment + 1] - first;
  const auto slot = [&](int64_t i) { return (first + (reverse ? count - 1 - i : i)) * problem.size; };
  DoubleVec totals[SCAN_NUMBERS / DOUBLE_LANES] = {};
  for (int64_t i = 0; i < count; i++) {
    float* target = problem.sums + slot(i);
    const float* source = i >= lag && lag >= 0 ? problem.states + slot(i - lag) : nullptr;
    for (int64_t c = begin; c < end; c += DOUBLE_LANES) {
      DoubleVec& total = totals[(c - begin) / DOUBLE_LANES];
      const auto numbers = [&](const float* from) {
        return HalfVec(*reinterpret_cast<const UnalignedHalfVec*>(from + c));
      };
      if (source) total += __builtin_convertvector(numbers(source), DoubleVec);
      const HalfVec sum = __builtin_convertvector(total, HalfVec);
      *reinterpret_cast<UnalignedHalfVec*>(target + c) = add ? numbers(target) + sum : sum;
    }
  }
}

}  // namespace

void group_states(const GroupStates& problem, const Parallel& parallel) {
  const int64_t size = problem.kv_heads * problem.width * state_row(problem.head_dim);
  const int64_t repeats = problem.heads / problem.kv_heads, numbers = repeats * most(problem.width, problem.head_dim);
  const int at_once = int(most<int64_t>(1, least<int64_t>(ROW_NUMBERS / numbers, problem.kv_heads)));
  int64_t* first = reinterpret_cast<int64_t*>(scratch<1>(size_t(problem.groups + 1) * 2));
  first[0] = 0;
  bool any_parts = false;
  for (int64_t g = 0; g < problem.groups; g++) {
    const int64_t parts = parts_of(problem.ends[g] - problem.begins[g]);
    first[g + 1] = first[g] + parts;
    any_parts |= parts > 1;
  }
  const int64_t parts = first[problem.groups];
  float* partials = any_parts ? scratch<2>(size_t(parts * size)) : nullptr;
  const int head_blocks = (problem.kv_heads + at_once - 1) / at_once;
  const Cut cut{problem, size, first, partials, at_once, head_blocks};
  with_type(problem.dtype, [&](auto element) {
    parallel(parts * head_blocks, [&](int64_t task) { sum_part<decltype(element)>(cut, task); });
  });
  if (!any_parts) return;
  const int64_t blocks = (size + SCAN_NUMBERS - 1) / SCAN_NUMBERS;
  parallel(problem.groups * blocks, [&](int64_t task) {
    const int64_t begin = task % blocks * SCAN_NUMBERS;
    add_parts(cut, task / blocks, begin, least(begin + SCAN_NUMBERS, size));
  });
}

void far_states(const FarStates& problem, const Parallel& parallel) {
  const int64_t blocks = (problem.size + SCAN_NUMBERS - 1) / SCAN_NUMBERS;
  parallel(problem.segments * blocks, [&](int64_t task) {
    const int64_t segment = task / blocks, begin = task % blocks * SCAN_NUMBERS;
    const int64_t end = least(begin + SCAN_NUMBERS, problem.size);
    if (problem.behind >= 0 || problem.ahead < 0) scan(problem, segment, problem.behind, false, false, begin, end);
    if (problem.ahead >= 0) scan(problem, segment, problem.ahead, true, problem.behind >= 0, begin, end);
  });
}

}  // namespace VOT_ISA
}  // namespace vot
