#include "range_attention.h"

#include "range_products.h"
#include "scratch.h"
#include "space.h"

namespace vot {
namespace VOT_ISA {
namespace {

constexpr int RUN_ROWS = 12;            // rows of one range that are rather a block of their own
constexpr int AHEAD = 16;               // rows between the one that is read and the one that is asked for
constexpr float LAZY = 8;               // how far scores may exceed the pivot, in powers of two

// Adds the scores of R rows, times `factor`, to their sums: put(r, j, weight) gets the vector 2^(factor score - pivot)
// for each of `vectors` vectors of row r.
//
// The pivot follows the largest score so far lazily: it moves when a score exceeds it by more than LAZY, and then
// decays[r] says by how much what was summed before shrinks. NaN compares false and so passes into the sums.
template <int R, class Put>
VOT_INLINE void exponentials(const float* scores, int vectors, Vec factor, float* pivots, float* sums, float* decays,
                             const Put& put) {
  Vec largest[R], pivot[R], total[R];
  for (int r = 0; r < R; r++) largest[r] = load(scores + r * SCORES_ROW);
  for (int j = 1; j < vectors; j++)
    for (int r = 0; r < R; r++) largest[r] = greater_of(load(scores + r * SCORES_ROW + j * LANES), largest[r]);
  for (int r = 0; r < R; r++) {
    decays[r] = 1;
    if (__builtin_expect(any_greater(largest[r] * factor, splat(pivots[r] + LAZY)), 0)) {
      const float raised = most(pivots[r], greatest(largest[r] * factor));
      decays[r] = exp2f(pivots[r] - raised);
      pivots[r] = raised;
    }
    pivot[r] = splat(pivots[r] == -INF ? 0 : pivots[r]);
    total[r] = load(sums + r * LANES) * splat(decays[r]);
  }
  for (int j = 0; j < vectors; j++)
    for (int r = 0; r < R; r++) {
      const Vec weight = exp2(load(scores + r * SCORES_ROW + j * LANES) * factor - pivot[r]);
      total[r] += weight;
      put(r, j, weight);
    }
  for (int r = 0; r < R; r++) store(sums + r * LANES, total[r]);
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

// The attention of the rows of a task over one key head. Rows are (token, head) pairs of the heads that share it, token
// by token, so that along them neither end of the range falls. `Products` multiplies them with keys and values.
template <class Products>
class Forward {
  static constexpr int ROWS = Products::ROWS;  // of a block of scores

 public:
  Forward(const RangeForward& problem, const RowsTask& task, int kv_head)
      : p_(problem),
        task_(task),
        kv_head_(kv_head),
        repeats_(problem.heads / problem.kv_heads),
        rows_((task.end - task.begin) * repeats_),
        depth_(problem.head_dim),
        columns_(int(round_up(problem.head_dim, LANES))),
        products_(problem, kv_head, rows_) {
    Space space;
    divide(space);
    space = {scratch(size_t(space.taken))};
    divide(space);
  }

  void run() {
    begin();
    const int64_t low = p_.low[task_.begin], high = p_.high[task_.end - 1];
    for (int64_t key = task_.first_key + (low - task_.first_key) / KEYS * KEYS; key < high; key += KEYS) {
      const int count = int(least<int64_t>(KEYS, high - key));
      products_.read_keys(key, count);
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
    const int64_t width = p_.far.states ? round_up(p_.far.width, LANES) : 0;
    products_.divide(space);
    outputs_ = space.take(rows_ * columns_);
    sums_ = space.take(rows_ * LANES);
    pivots_ = space.take(rows_);
    scores_ = space.take(ROWS * most<int64_t>(SCORES_ROW, width));
    decays_ = space.take(ROWS);
    far_ = space.take(p_.far.states ? ROWS * state_row(depth_) : 0);
  }

  int token(int row) const { return task_.begin + row / repeats_; }
  int head(int row) const { return kv_head_ * repeats_ + row % repeats_; }

  // Rows before the next block: at most ROWS, and if many have one range, these alone, which need no mask.
  int block_end(int row) const {
    const int end = least(row + ROWS, rows_), first = token(row), last = token(end - 1);
    int other = first + 1;
    while (other <= last && p_.low[other] == p_.low[first] && p_.high[other] == p_.high[first]) other++;
    const int run = (other - task_.begin) * repeats_;
    return run < end && run - row >= RUN_ROWS ? run : end;
  }

  void begin() {
    for (int i = 0; i < rows_; i++) {
      if (i + AHEAD < rows_) prefetch_row(p_.q, token(i + AHEAD), head(i + AHEAD), depth_);
      products_.read_query(i, token(i), head(i));
      pivots_[i] = -INF;
    }
    std::memset(outputs_, 0, sizeof(float) * size_t(rows_ * columns_));
    std::memset(sums_, 0, sizeof(float) * size_t(rows_ * LANES));
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
    const int begin = int(most<int64_t>(p_.low[first] - key, 0)), end = int(least<int64_t>(p_.high[last] - key, count));
    if (begin >= end) return;
    const int start = begin / LANES * LANES, stop = int(round_up(end, LANES)), vectors = (stop - start) / LANES;
    products_.scores(row, rows, start, stop, scores_);
    float* scores = scores_ + start;
    if (key + start < p_.low[last] || key + stop > p_.high[first])
      for (int i = 0; i < rows; i++)
        hide(scores + i * SCORES_ROW, vectors, key + start, p_.low[token(row + i)], p_.high[token(row + i)]);
    const auto weigh = [&](auto count, int i) {
      const auto put = [&](int r, int j, Vec weight) { products_.put_weight(scores_, i + r, start + j * LANES, weight); };
      exponentials<decltype(count)::value>(scores + i * SCORES_ROW, vectors, products_.factor(), pivots_ + row + i,
                                           sums_ + (row + i) * LANES, decays_ + i, put);
    };
    int i = 0;
    for (; i + 4 <= rows; i += 4) weigh(Number<4>{}, i);
    for (; i < rows; i++) weigh(Number<1>{}, i);
    products_.add_values(rows, begin, end, scores_, outputs_ + row * columns_, decays_);
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
    const int width = p_.far.width, stride = int(round_up(width, LANES)), state = int(state_row(depth_));
    for (int i = 0; i < rows; i++) {
      const int later = least(row + i + AHEAD, rows_ - 1);
      prefetch_row(p_.far.features, token(later), head(later), width);
      with_row(p_.far.features, token(row + i), head(row + i),
               [&](const auto* x) { feature_row(p_.far.map, x, width, scores_ + i * stride); });
    }
    const float* states = p_.far.states + (int64_t(slot) * p_.kv_heads + kv_head_) * width * state;
    multiply(rows, state, Left{scores_, stride, 1}, Right{states, state}, width, Result{far_, state});
    for (int i = 0; i < rows; i++) join(row + i, far_ + i * state);
  }

  // Near and far sums of a row under the pivot that is greater, so that nothing overflows.
  void join(int row, const float* far) {
    const float beta = p_.beta ? p_.beta[head(row)] * LOG2E : 0;
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
  const int kv_head_, repeats_, rows_, depth_, columns_;  // columns: head_dim in whole vectors
  Products products_;
  float *outputs_, *sums_, *pivots_, *scores_, *decays_, *far_;
};

template <class Products>
void forward(const RangeForward& problem, const Parallel& parallel) {
  parallel(problem.num_tasks * problem.kv_heads, [&](int64_t task) {
    Forward<Products>(problem, problem.tasks[task / problem.kv_heads], int(task % problem.kv_heads)).run();
  });
}

}  // namespace

void range_attention_forward(const RangeForward& problem, const Parallel& parallel) {
#ifdef __AMX_BF16__
  const auto is_bf16 = [](const HeadRows& rows) { return rows.dtype == Dtype::BF16; };
  if (is_bf16(problem.q) && is_bf16(problem.k) && is_bf16(problem.v) && is_bf16(problem.out))
    return forward<TileProducts>(problem, parallel);
#endif
  forward<FloatProducts>(problem, parallel);
}

}  // namespace VOT_ISA
}  // namespace vot
