#include "heads.h"

namespace vot {
namespace VOT_ISA {
namespace {

// Groups of rows, which may be empty, leave rows out or have some in common; a long one is summed in parts.
struct Ranges {
  int64_t tokens;
  std::vector<int32_t> begins, ends;

  explicit Ranges(Random& random) : tokens(random.chance(0.1) ? random.whole(1000, 2100) : random.whole(0, 60)) {
    for (int64_t groups = random.whole(0, 4); groups > 0; groups--) {
      const int64_t begin = random.whole(0, random.chance(0.5) ? 0 : tokens);
      begins.push_back(int32_t(begin));
      ends.push_back(int32_t(random.chance(0.5) ? tokens : random.whole(begin, tokens)));
    }
  }
  int64_t groups() const { return int64_t(begins.size()); }
};

template <class T>
void check(Random& random, const Parallel& parallel) {
  const Ranges ranges(random);
  const int kv_heads = int(random.whole(1, 3)), repeats = int(random.whole(1, 3)), heads = kv_heads * repeats;
  const int width = int(random.whole(1, 40)), head_dim = int(random.whole(1, 40)), row = int(state_row(head_dim));
  const FeatureMap map = FeatureMap(random.whole(0, 3));
  const Block<T> x(random, ranges.tokens, heads, width), v(random, ranges.tokens, heads, head_dim);
  const std::vector<float> weights = random.normals<float>(ranges.tokens * heads);
  const std::vector<float> last = random.normals<float>(ranges.tokens * heads);
  const bool weighted = random.chance(0.5), appended = random.chance(0.5);
  const float scale = random.chance(0.5) ? 1 : random.normal();
  std::vector<float> states(size_t(ranges.groups() * kv_heads * width * row), NAN);
  kernels.group_states({DTYPE<T>, map, x.rows(), v.rows(), heads, kv_heads, width, head_dim,
                        weighted ? weights.data() : nullptr, appended ? last.data() : nullptr, scale, ranges.groups(),
                        ranges.begins.data(), ranges.ends.data(), states.data()},
                       parallel);

  std::vector<Sum> expected(states.size());
  for (int64_t g = 0; g < ranges.groups(); g++)
    for (int64_t i = ranges.begins[size_t(g)]; i < ranges.ends[size_t(g)]; i++)
      for (int h = 0; h < heads; h++) {
        const std::vector<double> phi = features(map, x.row(i, h)), value = v.row(i, h);
        const size_t at = size_t(i * heads + h);
        const double weight = double(scale) * (weighted ? weights[at] : 1);
        Sum* state = &expected[size_t((g * kv_heads + h / repeats) * width * row)];
        for (int f = 0; f < width; f++, state += row) {
          for (int c = 0; c < head_dim; c++) state[c].add(weight * phi[size_t(f)] * value[size_t(c)]);
          state[head_dim].add(weight * phi[size_t(f)] * (appended ? last[at] : 1));
        }
      }
  for (size_t i = 0; i < states.size(); i++) {
    if (int64_t(i) % row > head_dim) expect_close("end of a row", states[i], 0, 0);
    else expect_sum<float>("state", states[i], expected[i]);
  }
}

// Numbers that do not fall, of groups from `first` to `last`.
std::vector<int32_t> rising(Random& random, int32_t first, int32_t last, int32_t count) {
  std::vector<int32_t> numbers;
  for (int32_t i = 0; i < count; i++) numbers.push_back(int32_t(random.whole(first, last)));
  std::sort(numbers.begin(), numbers.end());
  return numbers;
}

void check_far(Random& random, const Parallel& parallel) {
  const int64_t size = 16 * random.whole(1, random.chance(0.3) ? 300 : 10), segments = random.whole(0, 4);
  std::vector<int32_t> bounds = {0}, before, after;
  for (int64_t s = 0; s < segments; s++) {
    const int32_t first = bounds.back(), count = int32_t(random.chance(0.2) ? 0 : random.whole(1, 12));
    bounds.push_back(first + count);
    for (int32_t number : rising(random, first, first + count, count)) before.push_back(number);
    for (int32_t number : rising(random, first, first + count, count)) after.push_back(number);
  }
  const int sides = int(random.whole(1, 3));
  const int64_t groups = bounds.back();
  const std::vector<float> states = random.normals<float>(groups * size);
  std::vector<float> sums(states.size(), NAN);
  kernels.far_states({states.data(), size, segments, bounds.data(), sides & 1 ? before.data() : nullptr,
                      sides & 2 ? after.data() : nullptr, sums.data()},
                     parallel);
  for (int64_t s = 0; s < segments; s++)
    for (int32_t g = bounds[size_t(s)]; g < bounds[size_t(s) + 1]; g++)
      for (int64_t i = 0; i < size; i++) {
        Sum expected;
        const auto add = [&](int32_t begin, int32_t end) {
          for (int32_t other = begin; other < end; other++) expected.add(states[size_t(other * size + i)]);
        };
        if (sides & 1) add(bounds[size_t(s)], before[size_t(g)]);
        if (sides & 2) add(after[size_t(g)], bounds[size_t(s) + 1]);
        expect_sum<float>("far state", sums[size_t(g * size + i)], expected);
      }
}

Registered registered("group_states", [](Random& random, const Parallel& parallel) {
  for_each_type([&](auto zero) { check<decltype(zero)>(random, parallel); });
  check_far(random, parallel);
});

}  // namespace
}  // namespace VOT_ISA
}  // namespace vot
