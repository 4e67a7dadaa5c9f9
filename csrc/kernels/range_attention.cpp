#include "range_attention.h"

#include "head_features.h"
#include "range_products.h"
#include "scratch.h"
#include "space.h"

namespace vot {
namespace VOT_ISA {
namespace {

constexpr int RUN_ROWS = 12;            // rows of one range that are rather a block of their own
constexpr int AHEAD = 16;               // rows between the one that is read and the one that is asked for
constexpr float LAZY = 8;               // how far scores may exceed the pivot, in powers of two

// Adds the scores of R rows to their sums: put(r, j, weight) gets the vector 2^(scaled(score) - pivot) for each of
// `vectors` vectors of row r.
//
// The pivot follows the largest score so far lazily: it moves when a score exceeds it by more than LAZY, and then
// decays[r] says by how much what was summed before shrinks. NaN compares false and so passes into the sums.
template <int R, class Scaled, class Put>
VOT_INLINE void exponentials(const float* scores, int vectors, const Scaled& scaled, float* pivots, float* sums,
                             float* decays, const Put& put) {
  Vec largest[R], pivot[R], total[R];
  for (int r = 0; r < R; r++) largest[r] = load(scores + r * SCORES_ROW);
  for (int j = 1; j < vectors; j++)
    for (int r = 0; r < R; r++) largest[r] = greater_of(load(scores + r * SCORES_ROW + j * LANES), largest[r]);
  for (int r = 0; r < R; r++) {
    decays[r] = 1;
    if (__builtin_expect(any_greater(scaled(largest[r]), splat(pivots[r] + LAZY)), 0)) {
      const float raised = most(pivots[r], greatest(scaled(largest[r])));
      decays[r] = exp2f(pivots[r] - raised);
      pivots[r] = raised;
    }
    pivot[r] = splat(pivots[r] == -INF ? 0 : pivots[r]);
    total[r] = load(sums + r * LANES) * splat(decays[r]);
  }
  for (int j = 0; j < vectors; j++)
    for (int r = 0; r < R; r++) {
      const Vec weight = exp2(scaled(load(scores + r * SCORES_ROW + j * LANES)) - pivot[r]);
      total[r] += weight;
      put(r, j, weight);
    }
  for (int r = 0; r < R; r++) store(sums + r * LANES, total[r]);
}

// The exponent of the next power of two above x > 0.
VOT_INLINE float exponent_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return float((bits >> 23) - 126);
}

// Scores of keys that a row does not see become -inf; `first` is the key of the first score.
VOT_INLINE void hide(float* scores, int vectors, int64_t first, int64_t low, int64_t high) {
  if (first >= low && first + vectors * LANES <= high) return;
  const IntVec begin = IntVec{} + int32_t(low - first), end = IntVec{} + int32_t(high - first);
  IntVec key = lane_numbers();
  for (int j = 0; j < vectors; j++, key += LANES) {
    const Vec score = load(scores + j * LANES);
    store(scores + j * LANES, (key >= begin) & (key < end) ? score : splat(-INF));
  }
}

// The attention of the rows of a task over one key head. Rows are (token, head) pairs of heads that share it, token by
// token, so that along them neither end of the range falls. `Products` multiplies them with keys and values.
template <class Products>
class Forward {
  static constexpr int ROWS = Products::ROWS;  // of a block of scores

 public:
  Forward(const RangeForward& problem, const RowsTask& task, int first_head, int heads)
      : p_(problem),
        task_(task),
        first_head_(first_head),
        kv_head_(first_head / (problem.heads / problem.kv_heads)),
        repeats_(heads),
        rows_((task.end - task.begin) * repeats_),
        depth_(problem.head_dim),
        columns_(int(round_up(problem.head_dim, LANES))),
        stride_(int(round_up(problem.far.width, 16))),
        reach_low_(problem.pairs.low ? problem.pairs.low : problem.low),
        reach_high_(problem.pairs.low ? problem.pairs.high : problem.high),
        products_(problem, kv_head_, rows_) {
    Space space;
    divide(space);
    space = {scratch(size_t(space.taken))};
    divide(space);
  }

  void run() {
    begin();
    const int64_t low = reach_low_[task_.begin], high = reach_high_[task_.end - 1];
    for (int64_t key = task_.first_key + (low - task_.first_key) / KEYS * KEYS; key < high; key += KEYS) {
      const int count = int(least<int64_t>(KEYS, high - key));
      products_.read_keys(key, count);
      if (p_.pairs.low) read_key_features(key, count);
      for (int i = 0; i < rows_;) {
        const int next = block_end(i);
        prefetch(key + KEYS + i * KEYS / rows_, least(high, key + KEYS + next * KEYS / rows_));
        attend(i, next - i, key, count);
        i = next;
      }
    }
    if (p_.far.states) add_far();
    finish();
  }

 private:
  void divide(Space& space) {
    products_.divide(space);
    outputs_ = space.take(rows_ * columns_);
    sums_ = space.take(rows_ * LANES);
    pivots_ = space.take(rows_);
    scores_ = space.take(ROWS * SCORES_ROW);
    decays_ = space.take(ROWS);
    if (!p_.far.any()) return;
    features_ = space.take(rows_ * stride_);
    far_ = space.take(ROWS * most<int64_t>(SCORES_ROW, state_row(depth_)));
    if (!p_.pairs.low) return;
    key_features_ = space.take(KEYS * stride_);
    key_panels_ = space.take(KEYS / PANEL * panel_size(p_.far.width));
  }

  int token(int row) const { return task_.begin + row / repeats_; }
  int head(int row) const { return first_head_ + row % repeats_; }

  bool has_pairs(int token) const { return reach_low_[token] < p_.low[token] || p_.high[token] < reach_high_[token]; }

  // Rows before the next block: at most ROWS, and if many have one range, these alone, which need no mask.
  int block_end(int row) const {
    const int first = token(row), most_rows = has_pairs(first) ? Products::PAIR_ROWS : ROWS;
    const int end = least(row + most_rows, rows_), last = token(end - 1);
    int other = first + 1;
    while (other <= last && p_.low[other] == p_.low[first] && p_.high[other] == p_.high[first]) other++;
    const int run = (other - task_.begin) * repeats_;
    return run < end && run - row >= RUN_ROWS ? run : end;
  }

  void begin() {
    for (int i = 0; i < rows_; i++) {
      if (i + AHEAD < rows_) prefetch_row(p_.q, token(i + AHEAD), head(i + AHEAD), depth_);
      products_.read_query(i, token(i), head(i));
      if (p_.far.map == FeatureMap::GIVEN && p_.far.any() && i + AHEAD < rows_)
        prefetch_row(p_.far.features, token(i + AHEAD), head(i + AHEAD), p_.far.width);
      pivots_[i] = -INF;
    }
    const auto token_of = [&](int i) { return int64_t(token(i)); };
    if (p_.far.any())
      read_features(p_.far.features, p_.far.map, p_.far.width, rows_, token_of, [&](int i) { return head(i); }, features_,
                    stride_);
    std::memset(outputs_, 0, sizeof(float) * size_t(rows_ * columns_));
    std::memset(sums_, 0, sizeof(float) * size_t(rows_ * LANES));
  }

  void read_key_features(int64_t key, int count) {
    read_features(p_.pairs.features, p_.far.map, p_.far.width, count, [&](int i) { return key + i; },
                  [&](int) { return kv_head_; }, key_features_, stride_);
    transpose_to_panels(key_features_, stride_, count, p_.far.width, key_panels_);
  }

  // Keys of the next block, a few for each block of rows: many at once would wait for each other.
  void prefetch(int64_t key, int64_t end) {
    for (; key < end; key++) {
      prefetch_row(p_.k, key, kv_head_, depth_);
      prefetch_row(p_.v, key, kv_head_, depth_);
    }
  }

  // The block of `count` keys from `key` on for the rows from `row` on.
  void attend(int row, int rows, int64_t key, int count) {
    const int first = token(row), last = token(row + rows - 1);
    const auto place = [&](int64_t bound) { return int(most<int64_t>(0, least<int64_t>(bound - key, count))); };
    const int begin = place(reach_low_[first]), end = place(reach_high_[last]);
    if (begin >= end) return;
    bool pairs = false;
    for (int i = first; i <= last; i++)
      pairs |= place(reach_low_[i]) < place(p_.low[i]) || place(p_.high[i]) < place(reach_high_[i]);
    if (pairs) {
      weigh_all(row, rows, key, begin, end, place(p_.low[first]), place(p_.high[last]));
    } else {
      weigh_near(row, rows, key, begin, end,
                 [&](int r, int j, Vec weight) { products_.put_weight(scores_, r, j, weight); });
    }
    products_.add_values(rows, begin, end, scores_, outputs_ + row * columns_, decays_);
  }

  // put(row, key, weights) for near keys of the block from `begin` to before `end`; what a row does not see weighs 0.
  template <class Put>
  VOT_INLINE void weigh_near(int row, int rows, int64_t key, int begin, int end, const Put& put) {
    const int first = token(row), last = token(row + rows - 1);
    const int start = begin / LANES * LANES, stop = int(round_up(end, LANES)), vectors = (stop - start) / LANES;
    products_.scores(row, rows, start, stop, scores_);
    float* scores = scores_ + start;
    if (key + start < p_.low[last] || key + stop > p_.high[first])
      for (int i = 0; i < rows; i++)
        hide(scores + i * SCORES_ROW, vectors, key + start, p_.low[token(row + i)], p_.high[token(row + i)]);
    const auto scaled = [&](Vec score) __attribute__((always_inline)) { return products_.scaled(score); };
    const auto weigh = [&](auto count, int i) {
      exponentials<decltype(count)::value>(scores + i * SCORES_ROW, vectors, scaled, pivots_ + row + i,
                                           sums_ + (row + i) * LANES, decays_ + i,
                                           [&](int r, int j, Vec weight) { put(i + r, start + j * LANES, weight); });
    };
    int i = 0;
    for (; i + 4 <= rows; i += 4) weigh(Number<4>{}, i);
    for (; i < rows; i++) weigh(Number<1>{}, i);
  }

  // The weights of all keys of the block that rows reach, from `begin` to before `end`; near ones are among those from
  // `near_begin` to before `near_end`. Far ones raise the pivots first, for one pivot holds for both.
  void weigh_all(int row, int rows, int64_t key, int begin, int end, int near_begin, int near_end) {
    const int start = begin / LANES * LANES, stop = int(round_up(end, LANES));
    multiply_panels(rows, start, stop, Left{features_ + row * stride_, stride_, 1}, key_panels_, p_.far.width,
                    Result{far_, SCORES_ROW});
    float raised[ROWS];
    for (int i = 0; i < rows; i++) {
      raised[i] = raise_pivot(row + i, keep_far(token(row + i), key, start, stop, far_ + i * SCORES_ROW));
      std::memset(scores_ + i * SCORES_ROW + start, 0, sizeof(float) * size_t(stop - start));
      decays_[i] = 1;
    }
    if (near_begin < near_end)
      weigh_near(row, rows, key, near_begin, near_end,
                 [&](int r, int j, Vec weight) { store(scores_ + r * SCORES_ROW + j, weight); });
    float factors[ROWS + LANES];
    find_far_factors(row, rows, factors);
    for (int i = 0; i < rows; i++) {
      decays_[i] *= raised[i];
      float *sums = sums_ + (row + i) * LANES, *scores = scores_ + i * SCORES_ROW, *far = far_ + i * SCORES_ROW;
      const Vec factor = splat(factors[i]);
      Vec total = load(sums);
      for (int j = start; j < stop; j += LANES) {
        const Vec weight = load(far + j) * factor;
        total += weight;
        products_.put_weight(scores_, i, j, load(scores + j) + weight);
      }
      store(sums, total);
    }
  }

  // The greatest product of features of a far pair. Those of other keys become 0.
  VOT_INLINE float keep_far(int token, int64_t key, int start, int stop, float* far) const {
    const auto place = [&](int64_t bound) { return IntVec{} + int32_t(bound - key); };
    const IntVec begin = place(reach_low_[token]), low = place(p_.low[token]);
    const IntVec end = place(reach_high_[token]), high = place(p_.high[token]);
    IntVec at = lane_numbers() + start;
    Vec largest = {};
    for (int j = start; j < stop; j += LANES, at += LANES) {
      const Vec product = (at >= begin) & (at < end) & ((at < low) | (at >= high)) ? load(far + j) : Vec{};
      largest = greater_of(product, largest);
      store(far + j, product);
    }
    return greatest(largest);
  }

  float log_weight(int row) const { return p_.beta ? p_.beta[head(row)] * LOG2E : 0; }
  // What products of features weigh under the pivots, bounded so that it times 0 is 0.
  void find_far_factors(int row, int rows, float* factors) const {
    for (int i = 0; i < rows; i++)
      factors[i] = least(log_weight(row + i) - (pivots_[row + i] == -INF ? 0 : pivots_[row + i]), 120.f);
    for (int i = 0; i < rows; i += LANES) store(factors + i, exp2(load(factors + i)));
  }
  // Raises the pivot of a row, as exponentials() does, to a far weight, and returns by how much all before shrinks.
  VOT_INLINE float raise_pivot(int row, float product) {
    const float raised = log_weight(row) + exponent_of(product);
    if (!(product > 0) || raised <= pivots_[row] + LAZY) return 1;
    const float decay = exp2f(pivots_[row] - raised);
    pivots_[row] = raised;
    store(sums_ + row * LANES, load(sums_ + row * LANES) * splat(decay));
    return decay;
  }

  void add_far() {
    for (int i = 0; i < rows_;) {
      const int slot = p_.far.slots[token(i)];
      int end = i + 1;
      while (end < rows_ && end - i < ROWS && p_.far.slots[token(end)] == slot) end++;
      if (slot >= 0) add_state(i, end - i, slot);
      i = end;
    }
  }

  void add_state(int row, int rows, int slot) {
    const int width = p_.far.width, state = int(state_row(depth_));
    const float* states = p_.far.states + (int64_t(slot) * p_.kv_heads + kv_head_) * width * state;
    multiply(rows, state, Left{features_ + row * stride_, stride_, 1}, Right{states, state}, width, Result{far_, state});
    for (int i = 0; i < rows; i++) join(row + i, far_ + i * state);
  }

  // Near and far sums of a row under the pivot that is greater, so that nothing overflows.
  void join(int row, const float* far) {
    const float beta = log_weight(row);
    const float log_far = beta + log2f(far[depth_]), pivot = most(pivots_[row], log_far);
    if (log_far == -INF) return;
    const float near = exp2f(pivots_[row] - pivot), weight = exp2f(least(beta - pivot, 120.f));
    float* out = outputs_ + row * columns_;
    for (int j = 0; j < columns_; j += LANES)
      store(out + j, load(out + j) * splat(near) + load(far + j) * splat(weight));
    float* sums = sums_ + row * LANES;
    store(sums, load(sums) * splat(near));
    sums[0] += far[depth_] * weight;
    pivots_[row] = pivot;
  }

  void finish() {
    for (int i = 0; i < rows_; i++) {
      const float total = sum(load(sums_ + i * LANES));
      write_row(p_.out, token(i), head(i), depth_, total == 0 ? 0 : 1 / total, outputs_ + i * columns_);
      p_.lse[int64_t(token(i)) * p_.heads + head(i)] = total == 0 ? -INF : (pivots_[i] + log2f(total)) * LN2;
    }
  }

  const RangeForward& p_;
  const RowsTask& task_;
  const int first_head_, kv_head_, repeats_, rows_, depth_, columns_, stride_;  // columns: head_dim in whole vectors; stride: width
  const int32_t *reach_low_, *reach_high_;                         // what rows see, near or far and in no state
  Products products_;
  float *outputs_, *sums_, *pivots_, *scores_, *decays_, *features_, *far_, *key_features_, *key_panels_;
};

// Heads to which far keys are nothing, in a task that was cut for those with pairs: piece by piece, as without pairs, so
// that they have the bits of near attention alone.
template <class Products>
void forward_near(RangeForward problem, const RowsTask& task, int first_head, int heads) {
  problem.far = {}, problem.pairs = {};
  const auto apart = [&](int row) { return problem.low[row] >= problem.high[row - 1]; };
  int begin = task.begin;
  while (begin > 0 && !apart(begin)) begin--;
  int32_t first_key = problem.low[begin];
  for (int row = task.begin, end; row < task.end; row = end) {
    end = row + 1;
    while (end < task.end && !apart(end)) end++;
    Forward<Products>(problem, {row, end, first_key}, first_head, heads).run();
    if (end < task.end) first_key = problem.low[end];
  }
}

template <class Products>
void forward(const RangeForward& problem, const Parallel& parallel) {
  const int repeats = problem.heads / problem.kv_heads;
  parallel(problem.num_tasks * problem.kv_heads, [&](int64_t index) {
    const RowsTask& task = problem.tasks[index / problem.kv_heads];
    const int first = int(index % problem.kv_heads) * repeats;
    if (!problem.pairs.low) return Forward<Products>(problem, task, first, repeats).run();
    const auto sees_far = [&](int head) { return !problem.beta || problem.beta[head] != -INF; };
    for (int head = first, end; head < first + repeats; head = end) {
      end = head + 1;
      while (end < first + repeats && sees_far(end) == sees_far(head)) end++;
      if (sees_far(head)) {
        Forward<Products>(problem, task, head, end - head).run();
      } else {
        forward_near<Products>(problem, task, head, end - head);
      }
    }
  });
}

}  // namespace

void range_attention_forward(const RangeForward& problem, const Parallel& parallel) {
#ifdef __AVX512BF16__
#ifdef __AMX_BF16__
  using Bf16Products = TileProducts;
#else
  using Bf16Products = PairProducts;
#endif
  if (is_bf16(problem.q) && is_bf16(problem.k) && is_bf16(problem.v) && is_bf16(problem.out))
    return forward<Bf16Products>(problem, parallel);
#endif
  forward<FloatProducts>(problem, parallel);
}

}  // namespace VOT_ISA
}  // namespace vot
