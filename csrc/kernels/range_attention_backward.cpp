#include "range_attention.h"

#include "head_features.h"
#include "range_gradients.h"
#include "scratch.h"
#include "space.h"

namespace vot {
namespace VOT_ISA {
namespace {

constexpr int PAIR_ROWS = 48;           // of a block with far pairs: few, so that they see few other near keys than their own
constexpr int AHEAD = 16;               // rows between the one that is read and the one that is asked for
constexpr int FAR_ROWS = 64;            // rows of one state at a time

// The transposed state of a slot and head: to[e * stride + f] = state[f * row + e].
void transpose_state(const float* state, int row, int width, float* to, int64_t stride) {
  float last[16 * 16] = {};
  for (int f = 0; f < width; f += 16)
    for (int e = 0; e < row; e += 16) {
      const float* from = state + f * row + e;
      if (f + 16 > width) {
        for (int r = 0; r < width - f; r++) std::memcpy(last + r * 16, from + r * row, sizeof(float) * 16);
        transpose_16x16(last, 16, to + e * stride + f, stride);
      } else {
        transpose_16x16(from, row, to + e * stride + f, stride);
      }
    }
}

// body(first, count, slot) for runs of the tokens from `begin` to before `end` that share a slot, at most `most_rows`.
template <class Body>
void for_slots(const int32_t* slots, int begin, int end, int most_rows, const Body& body) {
  while (begin < end) {
    int next = begin + 1;
    while (next < end && next - begin < most_rows && slots[next] == slots[begin]) next++;
    body(begin, next - begin, slots[begin]);
    begin = next;
  }
}

// Gradients of the features of rows: `gradients[r]` = [values, last] of row r times F^T. The transposed state is kept
// from one call to the next, for as long as the slot is the same.
class FarGradient {
 public:
  FarGradient(const FarRows& far, int kv_heads, int head_dim)
      : far_(far),
        kv_heads_(kv_heads),
        depth_(head_dim),
        row_(int(state_row(head_dim))),
        stride_(int(round_up(far.width, 16))) {}

  // Floats from row to row of values and of gradients.
  int value_row() const { return row_; }
  int gradient_row() const { return stride_; }
  const float* state(int slot, int kv_head) const {
    return far_.states + (int64_t(slot) * kv_heads_ + kv_head) * far_.width * row_;
  }
  void divide(Space& space) { transposed_ = space.take(int64_t(row_) * stride_); }

  void operator()(int slot, int kv_head, const float* values, int rows, float* gradients) {
    if (slot != slot_) {
      slot_ = slot;
      transpose_state(state(slot, kv_head), row_, far_.width, transposed_, stride_);
    }
    multiply(rows, stride_, Left{values, row_, 1}, Right{transposed_, stride_}, depth_ + 1, Result{gradients, stride_});
  }

 private:
  const FarRows& far_;
  const int kv_heads_, depth_, row_, stride_;
  float* transposed_ = nullptr;
  int slot_ = -1;
};

// The rows of a task whose heads share a key head.
class RowsBackward {
 public:
  RowsBackward(const RangeRowsBackward& problem, const RowsTask& task, int kv_head)
      : p_(problem),
        task_(task),
        kv_head_(kv_head),
        repeats_(problem.heads / problem.kv_heads),
        depth_(problem.head_dim),
        gradient_(problem.far, problem.kv_heads, problem.head_dim) {
    Space space;
    divide(space);
    space = {scratch(size_t(space.taken))};
    divide(space);
  }

  void run() {
    for (int token = task_.begin; token < task_.end; token++)
      for (int head = kv_head_ * repeats_; head < (kv_head_ + 1) * repeats_; head++) {
        const int64_t at = int64_t(token) * p_.heads + head;
        p_.delta[at] = product(token, head) - (p_.d_lse ? p_.d_lse[at] : 0);
      }
    if (!p_.far.any()) return;
    for_slots(p_.far.slots, task_.begin, task_.end, most(1, FAR_ROWS / repeats_),
              [&](int first, int count, int slot) { add_far(first, count, slot); });
  }

 private:
  void divide(Space& space) {
    d_out_ = space.take(round_up(depth_, 16));
    if (!p_.far.any()) return;
    const int64_t rows = most(FAR_ROWS, repeats_);
    values_ = space.take(rows * gradient_.value_row());
    gradients_ = space.take(rows * gradient_.gradient_row());
    features_ = space.take(gradient_.gradient_row());
    gradient_.divide(space);
  }

  // d_out.out of a row.
  float product(int token, int head) {
    read_row(p_.d_out, token, head, depth_, 1, d_out_);
    Vec total = {};
    with_row(p_.out, token, head, [&](const auto* out) {
      int j = 0;
      for (; j + LANES <= depth_; j += LANES) total += load(d_out_ + j) * load(out + j);
      if (j < depth_) total += load(d_out_ + j) * load_part(out + j, depth_ - j);
    });
    return sum(total);
  }

  void add_far(int first, int count, int slot) {
    const int rows = count * repeats_, row = gradient_.value_row();
    const auto each = [&](const auto& body) {
      for (int i = 0; i < rows; i++) body(i, first + i / repeats_, kv_head_ * repeats_ + i % repeats_);
    };
    if (slot < 0) {
      std::memset(gradients_, 0, sizeof(float) * size_t(gradient_.gradient_row()));
      return each([&](int, int token, int head) { put(token, head, far_weight(token, head), 0, gradients_); });
    }
    each([&](int i, int token, int head) {
      read_row(p_.d_out, token, head, depth_, 1, values_ + i * row);
      values_[i * row + depth_] = -p_.delta[int64_t(token) * p_.heads + head];
    });
    gradient_(slot, kv_head_, values_, rows, gradients_);
    each([&](int i, int token, int head) { put_gradient(token, head, gradients_ + i * gradient_.gradient_row()); });
  }

  void put_gradient(int token, int head, float* gradient) {
    const int width = p_.far.width;
    const float weight = far_weight(token, head);
    with_row(p_.far.features, token, head, [&](const auto* x) { feature_row(p_.far.map, x, width, features_); });
    Vec d_beta = {};
    for (int j = 0; j < width; j += LANES) {
      store(gradient + j, load(gradient + j) * splat(weight));
      d_beta += load(features_ + j) * load(gradient + j);
    }
    if (p_.far.map != FeatureMap::GIVEN) feature_row_backward(p_.far.map, features_, gradient, width, gradient);
    put(token, head, weight, sum(d_beta), gradient);
  }

  // Bounded, so that it times an absent far part is 0 and not NaN.
  float far_weight(int token, int head) const {
    const float lse = p_.lse[int64_t(token) * p_.heads + head];
    return expf(least((p_.beta ? p_.beta[head] : 0) - lse, 80.f));
  }

  void put(int token, int head, float weight, float d_beta, const float* gradient) {
    const int64_t at = int64_t(token) * p_.heads + head;
    p_.far_weight[at] = weight;
    p_.d_beta[at] = d_beta;
    write_row(p_.d_features, token, head, p_.far.width, 1, gradient);
  }

  const RangeRowsBackward& p_;
  const RowsTask& task_;
  const int kv_head_, repeats_, depth_;
  FarGradient gradient_;
  float *d_out_, *values_, *gradients_, *features_;
};

// The keys of a task and one head of them, CHUNK_KEYS at a time, and of the rows CHUNK_ROWS at a time. Rows are (token,
// head) pairs of the heads that share the key head, token by token. `Products` multiplies their queries, keys and values.
template <class Products>
class KeysBackward {
  static constexpr int AT_ONCE = Products::AT_ONCE;

 public:
  KeysBackward(const RangeKeysBackward& problem, const KeysTask& task, int kv_head)
      : p_(problem),
        task_(task),
        kv_head_(kv_head),
        repeats_(problem.heads / problem.kv_heads),
        depth_(problem.head_dim),
        columns_(int(round_up(problem.head_dim, LANES))),
        stride_(int(round_up(problem.far.width, 16))),
        reach_low_(problem.pairs.low ? problem.pairs.low : problem.low),
        reach_high_(problem.pairs.low ? problem.pairs.high : problem.high),
        gradient_(problem.far, problem.kv_heads, problem.head_dim),
        products_(problem, kv_head) {
    Space space;
    divide(space);
    space = {scratch(size_t(space.taken))};
    divide(space);
  }

  void run() {
    for (int key = task_.begin; key < task_.end; key += CHUNK_KEYS) {
      first_key_ = key;
      num_keys_ = least(CHUNK_KEYS, task_.end - key);
      read_keys();
      const int first = first_token(reach_high_, key + 1), end = first_token(reach_low_, key + num_keys_);
      for (first_token_ = first; first_token_ < end; first_token_ += tokens_at_once()) {
        num_rows_ = least(tokens_at_once(), end - first_token_) * repeats_;
        read_rows();
        for (int block = 0; block < num_keys_; block += KEYS)
          for (int row = 0, next; row < num_rows_; row = next) {
            next = least(row + (has_pairs(token(row)) ? PAIR_ROWS : ROWS), num_rows_);
            add_block(block, least(KEYS, num_keys_ - block), row, next - row);
          }
        write_rows();
      }
      if (p_.far.any())
        for_slots(p_.far.slots, key, key + num_keys_, FAR_ROWS,
                  [&](int first, int count, int slot) { add_far(first, count, slot); });
      write_keys();
    }
  }

 private:
  void divide(Space& space) {
    const int64_t rows = most(CHUNK_ROWS, repeats_);
    products_.divide(space, rows);
    dk_ = space.take(CHUNK_KEYS * columns_);
    dv_ = space.take(CHUNK_KEYS * columns_);
    dq_ = space.take(rows * columns_);
    lse_ = space.take(rows);
    delta_ = space.take(rows);
    if (!p_.far.any()) return;
    key_features_ = space.take(CHUNK_KEYS * stride_);
    far_values_ = space.take(FAR_ROWS * gradient_.value_row());
    gradients_ = space.take(FAR_ROWS * stride_);
    gradient_.divide(space);
    if (!p_.pairs.low) return;
    key_panels_ = space.take(CHUNK_KEYS / PANEL * panel_size(p_.far.width));
    dk_features_ = space.take(CHUNK_KEYS * stride_);
    row_features_ = space.take(rows * stride_);
    dq_features_ = space.take(rows * stride_);
    far_weight_ = space.take(rows);
    far_ = space.take(ROWS * SCORES_ROW);
  }

  bool has_pairs(int token) const { return reach_low_[token] < p_.low[token] || p_.high[token] < reach_high_[token]; }
  int tokens_at_once() const { return most(1, CHUNK_ROWS / repeats_); }
  int token(int row) const { return first_token_ + row / repeats_; }
  int head(int row) const { return kv_head_ * repeats_ + row % repeats_; }

  // The first row of the segment whose bound is not below `key`.
  int first_token(const int32_t* bounds, int key) const {
    int begin = task_.first_row, end = task_.end_row;
    while (begin < end) {
      const int middle = (begin + end) / 2;
      if (bounds[middle] < key) {
        begin = middle + 1;
      } else {
        end = middle;
      }
    }
    return begin;
  }

  void read_keys() {
    products_.read_keys(first_key_, num_keys_);
    std::memset(dk_, 0, sizeof(float) * size_t(num_keys_ * columns_));
    std::memset(dv_, 0, sizeof(float) * size_t(num_keys_ * columns_));
    if (!p_.far.any()) return;
    read_features(p_.far.features, p_.far.map, p_.far.width, num_keys_, [&](int i) { return int64_t(first_key_ + i); },
                  [&](int) { return kv_head_; }, key_features_, stride_);
    if (!p_.pairs.low) return;
    transpose_to_panels(key_features_, stride_, num_keys_, p_.far.width, key_panels_);
    std::memset(dk_features_, 0, sizeof(float) * size_t(num_keys_ * stride_));
  }

  // Where what the part finds for a row is summed.
  int64_t place(int row) const { return (int64_t(task_.part) * p_.rows + token(row)) * p_.heads + head(row); }
  // Whether the part has begun the sums of a row.
  bool reached_before(int row) const { return most(reach_low_[token(row)], task_.begin) < first_key_; }

  // Scores are found in powers of two.
  void read_rows() {
    for (int i = 0; i < num_rows_; i++) {
      const int64_t at = int64_t(token(i)) * p_.heads + head(i);
      const int later = least(i + AHEAD, num_rows_ - 1);
      prefetch_row(p_.q, token(later), head(later), depth_);
      prefetch_row(p_.d_out, token(later), head(later), depth_);
      products_.read_row_of(i, num_rows_, token(i), head(i));
      lse_[i] = p_.lse[at] == -INF ? INF : p_.lse[at] * LOG2E;
      delta_[i] = p_.delta[at];
      const float* begun = p_.begun ? p_.begun + at * depth_ : nullptr;
      take_sum(reached_before(i) ? p_.dq + place(i) * depth_ : begun, depth_, dq_ + i * columns_);
      if (p_.pairs.low) far_weight_[i] = p_.far_weight[at];
    }
    if (!p_.pairs.low) return;
    const auto token_of = [&](int i) { return int64_t(token(i)); };
    read_features(p_.pairs.features, p_.far.map, p_.far.width, num_rows_, token_of, [&](int i) { return head(i); },
                  row_features_, stride_);
    std::memset(dq_features_, 0, sizeof(float) * size_t(num_rows_ * stride_));
  }
  // to = from, null for 0.
  static void take_sum(const float* from, int width, float* to) {
    if (from) return take_row(from, width, 1.f, to);
    std::memset(to, 0, sizeof(float) * size_t(round_up(width, LANES)));
  }

  void write_rows() {
    for (int i = 0; i < num_rows_; i++) {
      if (p_.pairs.low) write_row_of_pairs(i);
      put_row(p_.dq + place(i) * depth_, depth_, 1.f, dq_ + i * columns_);
    }
  }
  // The gradient through a feature map is linear in that of the features: each chunk of keys adds its share.
  void write_row_of_pairs(int i) {
    const int width = p_.far.width;
    float *features = row_features_ + i * stride_, *gradient = dq_features_ + i * stride_;
    if (p_.d_beta) add_d_beta(p_.d_beta + place(i), features, gradient);
    if (p_.far.map == FeatureMap::GIVEN) {
      float* sums = p_.d_q_features + place(i) * width;
      if (reached_before(i)) {
        take_row(sums, width, 1.f, features);
        add_row(features, gradient, width);
      }
      return put_row(sums, width, 1.f, gradient);
    }
    feature_row_backward(p_.far.map, features, gradient, width, gradient);
    add_row(gradient, dq_ + i * columns_, depth_);
  }

  // One block of scores, and its part of all three gradients.
  void add_block(int key, int keys, int row, int rows) {
    const int first = token(row), last = token(row + rows - 1), here = first_key_ + key;
    if (reach_high_[last] <= here || reach_low_[first] >= here + keys) return;
    const auto place = [&](int64_t bound) { return int(most<int64_t>(0, least<int64_t>(bound - here, keys))); };
    bool pairs = false;
    for (int i = first; i <= last; i++)
      pairs |= place(reach_low_[i]) < place(p_.low[i]) || place(p_.high[i]) < place(reach_high_[i]);
    if (pairs) return add_block_of_pairs(key, keys, row, rows, place(p_.low[first]), place(p_.high[last]));
    const Block block = {key, row, rows};
    const int stop = int(round_up(keys, LANES));
    products_.find_scores(block, 0, stop);
    products_.find_d_weights(block, stop);
    in_turn(rows, [&](auto count, int i) { find_gradients<decltype(count)::value>(i, row + i, stop, here); });
    products_.add_dv(block, 0, keys, dv_ + key * columns_);
    products_.add_dk(block, 0, keys, dk_ + key * columns_);
    products_.add_dq(block, 0, keys, dq_ + row * columns_);
  }

  // The same of a block with far pairs; near keys are among those from `begin` to before `end`.
  void add_block_of_pairs(int key, int keys, int row, int rows, int begin, int end) {
    const Block block = {key, row, rows};
    const int stop = int(round_up(keys, LANES)), here = first_key_ + key, width = p_.far.width, near = end - begin;
    const Left features = {row_features_ + row * stride_, stride_, 1};
    if (near > 0) products_.find_scores(block, begin / LANES * LANES, int(round_up(end, LANES)));
    products_.find_d_weights(block, stop);
    multiply_panels(rows, 0, stop, features, key_panels_ + key / PANEL * panel_size(width), width,
                    Result{far_, SCORES_ROW});
    in_turn(rows, [&](auto count, int i) { find_pair_gradients<decltype(count)::value>(i, row + i, here, stop); });
    products_.add_dv(block, 0, keys, dv_ + key * columns_);
    multiply(keys, stride_, Left{far_, 1, SCORES_ROW}, Right{features.data, stride_}, rows,
             Result{dk_features_ + key * stride_, stride_}, Old::KEEP);
    multiply(rows, stride_, Left{far_, SCORES_ROW, 1}, Right{key_features_ + key * stride_, stride_}, keys,
             Result{dq_features_ + row * stride_, stride_}, Old::KEEP);
    if (near <= 0) return;
    products_.add_dk(block, begin, near, dk_ + (key + begin) * columns_);
    products_.add_dq(block, begin, near, dq_ + row * columns_);
  }

  // body(Number, row) for rows that are put at once, and for what is left of them.
  template <class Body>
  static VOT_INLINE void in_turn(int rows, const Body& body) {
    int i = 0;
    for (; i + AT_ONCE <= rows; i += AT_ONCE) body(Number<AT_ONCE>{}, i);
    if (i < rows) body(Number<1>{}, i);
  }

  // Of rows of a block: the weights of near keys, `here` the first, and the gradients of their scores.
  template <int COUNT>
  VOT_INLINE void find_gradients(int i, int row, int stop, int here) {
    Vec weights[AT_ONCE] = {}, d_scores[AT_ONCE] = {};
    const Vec factor = products_.factor();
    bool hides = false;
    for (int r = 0; r < COUNT && !hides; r++)
      hides = p_.low[token(row + r)] > here || p_.high[token(row + r)] < here + stop;
    IntVec key = lane_numbers() + here;
    for (int j = 0; j < stop; j += LANES, key += LANES) {
      for (int r = 0; r < COUNT; r++) {
        weights[r] = exp2(products_.score(i + r, j) * factor - splat(lse_[row + r]));
        const int32_t *low = p_.low + token(row + r), *high = p_.high + token(row + r);
        if (hides) weights[r] = (key >= *low) & (key < *high) ? weights[r] : Vec{};
        d_scores[r] = weights[r] * (products_.d_weight(i + r, j) - splat(delta_[row + r]));
      }
      products_.put(i, j, weights, d_scores);
    }
  }

  // The same of rows that reach far keys, and in place of phi(q).phi(k) its gradient.
  template <int COUNT>
  VOT_INLINE void find_pair_gradients(int i, int row, int here, int stop) {
    Vec weights[AT_ONCE] = {}, d_scores[AT_ONCE] = {};
    const Vec factor = products_.factor();
    IntVec key = lane_numbers() + here;
    for (int j = 0; j < stop; j += LANES, key += LANES) {
      for (int r = 0; r < COUNT; r++) {
        const int at = token(row + r);
        float* far = far_ + (i + r) * SCORES_ROW + j;
        const IntVec near = (key >= p_.low[at]) & (key < p_.high[at]);
        const IntVec reached = (key >= reach_low_[at]) & (key < reach_high_[at]);
        const Vec d_weight = products_.d_weight(i + r, j) - splat(delta_[row + r]);
        const Vec near_weight = near ? exp2(products_.score(i + r, j) * factor - splat(lse_[row + r])) : Vec{};
        const Vec far_weight = reached & ~near ? splat(far_weight_[row + r]) : Vec{};
        weights[r] = near_weight + far_weight * load(far);
        d_scores[r] = near_weight * d_weight;
        store(far, far_weight * d_weight);
      }
      products_.put(i, j, weights, d_scores);
    }
  }

  void add_d_beta(float* d_beta, const float* features, const float* gradient) const {
    Vec total = {};
    for (int j = 0; j < p_.far.width; j += LANES) total += load(features + j) * load(gradient + j);
    *d_beta += sum(total);
  }

  // What `count` keys from `first` on have of far rows: of states, and of pairs.
  void add_far(int first, int count, int slot) {
    const int width = p_.far.width, offset = first - first_key_;
    if (slot >= 0) {
      add_state(first, count, slot);
    } else {
      std::memset(gradients_, 0, sizeof(float) * size_t(count * stride_));
    }
    for (int i = 0; i < count; i++) {
      float* gradient = gradients_ + i * stride_;
      if (p_.pairs.low) add_row(dk_features_ + (offset + i) * stride_, gradient, width);
      if (p_.far.map == FeatureMap::GIVEN) {
        write_row(p_.d_features, first + i, kv_head_, width, 1, gradient);
        continue;
      }
      feature_row_backward(p_.far.map, key_features_ + (offset + i) * stride_, gradient, width, gradient);
      float* dk = dk_ + (offset + i) * columns_;  // in units of D_KEY until it is written
      const Vec factor = splat(Products::INVERSE_D_KEY);
      for (int j = 0; j < columns_; j += LANES) store(dk + j, load(dk + j) + load(gradient + j) * factor);
    }
  }

  // The gradients of the features of keys that a state of far rows gives, and its share of dv.
  void add_state(int first, int count, int slot) {
    const int row = gradient_.value_row(), offset = first - first_key_;
    for (int i = 0; i < count; i++) {
      read_row(p_.v, first + i, kv_head_, depth_, 1, far_values_ + i * row);
      far_values_[i * row + depth_] = 1;
    }
    gradient_(slot, kv_head_, far_values_, count, gradients_);
    multiply(count, columns_, Left{key_features_ + offset * stride_, stride_, 1},
             Right{gradient_.state(slot, kv_head_), row}, p_.far.width, Result{dv_ + offset * columns_, columns_},
             Old::KEEP);
  }

  // to += from, `width` numbers in whole vectors.
  static void add_row(const float* from, float* to, int width) {
    for (int j = 0; j < width; j += LANES) store(to + j, load(to + j) + load(from + j));
  }

  void write_keys() {
    for (int i = 0; i < num_keys_; i++) {
      write_row(p_.dk, first_key_ + i, kv_head_, depth_, Products::D_KEY, dk_ + i * columns_);
      write_row(p_.dv, first_key_ + i, kv_head_, depth_, 1, dv_ + i * columns_);
    }
  }

  const RangeKeysBackward& p_;
  const KeysTask& task_;
  const int kv_head_, repeats_, depth_, columns_, stride_;  // columns: head_dim in whole vectors; stride: width
  const int32_t *reach_low_, *reach_high_;                  // what rows see, near or far and in no state
  FarGradient gradient_;
  Products products_;
  int first_key_, num_keys_, first_token_, num_rows_;  // of the chunk
  float *dk_, *dv_, *dq_, *lse_, *delta_;
  float *key_features_, *far_values_, *gradients_;
  float *key_panels_, *dk_features_, *row_features_, *dq_features_, *far_weight_, *far_;  // of pairs
};

template <class Products>
void keys_backward(const RangeKeysBackward& problem, const Parallel& parallel) {
  parallel(problem.num_tasks * problem.kv_heads, [&](int64_t task) {
    KeysBackward<Products>(problem, problem.tasks[task / problem.kv_heads], int(task % problem.kv_heads)).run();
  });
}

}  // namespace

void range_attention_rows_backward(const RangeRowsBackward& problem, const Parallel& parallel) {
  parallel(problem.num_tasks * problem.kv_heads, [&](int64_t task) {
    RowsBackward(problem, problem.tasks[task / problem.kv_heads], int(task % problem.kv_heads)).run();
  });
}

void range_attention_keys_backward(const RangeKeysBackward& problem, const Parallel& parallel) {
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
  if (is_bf16(problem.q) && is_bf16(problem.k) && is_bf16(problem.v) && is_bf16(problem.d_out))
    return keys_backward<PairGradients>(problem, parallel);
#endif
  keys_backward<FloatGradients>(problem, parallel);
}

void range_attention_sum_parts(const RangeSumParts& problem, const Parallel& parallel) {
  const int64_t row = int64_t(problem.heads) * problem.head_dim, part = problem.rows * row;
  parallel(problem.num_tasks, [&](int64_t index) {
    const SumTask& task = problem.tasks[index];
    float total[256 + LANES];
    for (int64_t token = task.begin; token < task.end; token++)
      for (int head = 0; head < problem.heads; head++) {
        const int64_t at = token * row + head * problem.head_dim;
        std::memset(total, 0, sizeof total);
        if (problem.begun) take_row(problem.begun + at, problem.head_dim, 1.f, total);
        for (int64_t i = task.first_part; i < task.end_part; i++)
          for (int j = 0; j < problem.head_dim; j += LANES) {
            const int count = least(LANES, problem.head_dim - j);
            store(total + j, load(total + j) + load_part(problem.parts + i * part + at + j, count));
          }
        write_row(problem.dq, token, head, problem.head_dim, 1, total);
      }
  });
}

}  // namespace VOT_ISA
}  // namespace vot
