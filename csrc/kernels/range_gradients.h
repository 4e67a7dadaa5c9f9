// The five products of range attention's backward, in two ways: scores, gradients of weights, and those of values, keys
// and queries.
#pragma once
#include "bf16_rows.h"
#include "head_rows.h"
#include "range_attention.h"
#include "space.h"

namespace vot {
namespace VOT_ISA {

constexpr int ROWS = 96, KEYS = 128;    // of a block of scores
constexpr int SCORES_ROW = KEYS + 16;   // floats from row to row: a power of two would fall into few sets of the cache
constexpr int CHUNK_ROWS = 4 * ROWS;    // rows and keys that stay in the cache while all blocks of their scores are done
constexpr int CHUNK_KEYS = 4 * KEYS;

// Rows and keys are counted from the first of a chunk. A block has the rows from `row` on and the keys from `key` on, of
// which the first is the key 0 of its scores.
struct Block {
  int key, row, rows;
};

// In floats, whatever the types in memory.
class FloatGradients {
 public:
  static constexpr int AT_ONCE = 1;                            // rows whose weights are put at once
  static constexpr float D_KEY = LN2, INVERSE_D_KEY = LOG2E;  // times the sum of dk is dk

  FloatGradients(const RangeKeysBackward& problem, int kv_head)
      : p_(problem),
        kv_head_(kv_head),
        depth_(problem.head_dim),
        columns_(int(round_up(problem.head_dim, LANES))) {}

  void divide(Space& space, int64_t rows) {
    const int64_t panels = CHUNK_KEYS / PANEL * panel_size(depth_);
    keys_ = space.take(panels);
    values_ = space.take(panels);
    scaled_keys_ = space.take(CHUNK_KEYS * columns_);
    queries_ = space.take(rows * columns_);
    d_out_ = space.take(rows * columns_);
    weights_ = space.take(ROWS * SCORES_ROW);
    d_scores_ = space.take(ROWS * SCORES_ROW);
  }
  void read_keys(int first, int count) {
    read_transposed(p_.k, first, count, kv_head_, depth_, keys_);
    read_transposed(p_.v, first, count, kv_head_, depth_, values_);
    for (int i = 0; i < count; i++) read_row(p_.k, first + i, kv_head_, depth_, p_.scale, scaled_keys_ + i * columns_);
  }
  // Row i of all that are read.
  void read_row_of(int i, int, int64_t token, int head) {
    read_row(p_.q, token, head, depth_, p_.scale * LOG2E, queries_ + i * columns_);
    read_row(p_.d_out, token, head, depth_, 1, d_out_ + i * columns_);
  }

  // Of the keys from `begin` to before `end`, multiples of LANES: scores, in powers of two when multiplied by factor(),
  // and gradients of weights.
  void find_scores(Block block, int begin, int end) {
    multiply_panels(block.rows, begin, end, left(queries_, block.row), panel(keys_, block.key), depth_, {weights_, SCORES_ROW});
  }
  void find_d_weights(Block block, int end) {
    multiply_panels(block.rows, 0, end, left(d_out_, block.row), panel(values_, block.key), depth_, {d_scores_, SCORES_ROW});
  }
  VOT_INLINE Vec factor() const { return splat(1); }
  VOT_INLINE Vec score(int i, int key) const { return load(weights_ + i * SCORES_ROW + key); }
  VOT_INLINE Vec d_weight(int i, int key) const { return load(d_scores_ + i * SCORES_ROW + key); }
  // The weights of rows i … i + AT_ONCE - 1 and the gradients of their scores, in place of what was found.
  VOT_INLINE void put(int i, int key, const Vec (&weights)[AT_ONCE], const Vec (&d_scores)[AT_ONCE]) {
    store(weights_ + i * SCORES_ROW + key, weights[0]);
    store(d_scores_ + i * SCORES_ROW + key, d_scores[0]);
  }

  // Add what `count` keys from the key `begin` of the block on, or all its rows, find. Results have `columns` floats.
  void add_dv(Block block, int begin, int count, float* dv) const {
    add(count, {weights_ + begin, 1, SCORES_ROW}, d_out_ + block.row * columns_, block.rows, dv);
  }
  void add_dk(Block block, int begin, int count, float* dk) const {
    add(count, {d_scores_ + begin, 1, SCORES_ROW}, queries_ + block.row * columns_, block.rows, dk);
  }
  void add_dq(Block block, int begin, int count, float* dq) const {
    add(block.rows, {d_scores_ + begin, SCORES_ROW, 1}, scaled_keys_ + (block.key + begin) * columns_, count, dq);
  }

 private:
  Left left(const float* rows, int row) const { return {rows + row * columns_, columns_, 1}; }
  const float* panel(const float* panels, int key) const { return panels + key / PANEL * panel_size(depth_); }
  void add(int rows, Left left, const float* right, int depth, float* sums) const {
    multiply(rows, columns_, left, Right{right, columns_}, depth, Result{sums, columns_}, Old::KEEP);
  }

  const RangeKeysBackward& p_;
  const int kv_head_, depth_, columns_;
  float *keys_, *values_, *scaled_keys_, *queries_, *d_out_, *weights_, *d_scores_;
};

#ifdef __AVX512BF16__
// In pairs of bf16, with sums in floats: weights and the gradients of scores are rounded to bf16. Pairs lie along what a
// product sums over: numbers of a head for scores, rows for dv and dk, keys for dq.
class PairGradients {
 public:
  static constexpr int AT_ONCE = 2;
  static constexpr float D_KEY = 1, INVERSE_D_KEY = 1;

  PairGradients(const RangeKeysBackward& problem, int kv_head)
      : p_(problem),
        kv_head_(kv_head),
        depth_(problem.head_dim),
        columns_(int(round_up(problem.head_dim, LANES))),
        pairs_((problem.head_dim + 1) / 2),
        row_(int(round_up(problem.head_dim, 32)) / 2) {}

  void divide(Space& space, int64_t rows) {
    const int64_t panels = CHUNK_KEYS / PANEL * panel_size(pairs_);
    keys_ = space.take(panels);
    values_ = space.take(panels);
    key_pairs_ = space.take(CHUNK_KEYS / 2 * columns_);
    queries_ = space.take(rows * row_);
    d_out_ = space.take(rows * row_);
    query_pairs_ = space.take((rows + 1) / 2 * columns_);
    d_out_pairs_ = space.take((rows + 1) / 2 * columns_);
    scores_ = space.take(ROWS * SCORES_ROW);
    d_weights_ = space.take(ROWS * SCORES_ROW);
    d_scores_ = space.take(ROWS * D_SCORES_ROW);
  }
  void read_keys(int first, int count) {
    read_transposed_pairs(p_.k, first, count, kv_head_, depth_, keys_);
    read_transposed_pairs(p_.v, first, count, kv_head_, depth_, values_);
    read_row_pairs(p_.k, first, count, kv_head_, depth_, key_pairs_, columns_);
  }
  // The last row without another counts as one beside a row of zeros.
  void read_row_of(int i, int rows, int64_t token, int head) {
    read(p_.q, i, rows, token, head, queries_, query_pairs_);
    read(p_.d_out, i, rows, token, head, d_out_, d_out_pairs_);
  }

  void find_scores(Block block, int begin, int end) {
    multiply_panels<Pairs>(block.rows, begin, end, left(queries_, block.row), panel(keys_, block.key), pairs_,
                           {scores_, SCORES_ROW});
  }
  void find_d_weights(Block block, int end) {
    multiply_panels<Pairs>(block.rows, 0, end, left(d_out_, block.row), panel(values_, block.key), pairs_,
                           {d_weights_, SCORES_ROW});
  }
  VOT_INLINE Vec factor() const { return splat(p_.scale * LOG2E); }
  VOT_INLINE Vec score(int i, int key) const { return load(scores_ + i * SCORES_ROW + key); }
  VOT_INLINE Vec d_weight(int i, int key) const { return load(d_weights_ + i * SCORES_ROW + key); }
  // Pairs of rows take the place of the first of them. Of dv and dk the pairs are rows, of dq they are keys.
  VOT_INLINE void put(int i, int key, const Vec (&weights)[AT_ONCE], const Vec (&d_scores)[AT_ONCE]) {
    const Vec scale = splat(p_.scale), first = d_scores[0] * scale, second = d_scores[1] * scale;
    store(scores_ + i * SCORES_ROW + key, pair(weights[0], weights[1]));
    store(d_weights_ + i * SCORES_ROW + key, pair(first, second));
    bf16* row = reinterpret_cast<bf16*>(d_scores_ + i * D_SCORES_ROW) + key;
    put_rounded(row, first);
    put_rounded(row + 2 * D_SCORES_ROW, second);
  }

  void add_dv(Block block, int begin, int count, float* dv) const {
    add(count, {scores_ + begin, 1, 2 * SCORES_ROW}, d_out_pairs_ + block.row / 2 * columns_, (block.rows + 1) / 2, dv);
  }
  void add_dk(Block block, int begin, int count, float* dk) const {
    add(count, {d_weights_ + begin, 1, 2 * SCORES_ROW}, query_pairs_ + block.row / 2 * columns_, (block.rows + 1) / 2, dk);
  }
  // Gradients of the scores beside the first and the last of these keys are 0.
  void add_dq(Block block, int begin, int count, float* dq) const {
    const int first = begin / 2, last = (begin + count + 1) / 2;
    add(block.rows, {d_scores_ + first, D_SCORES_ROW, 1}, key_pairs_ + (block.key / 2 + first) * columns_, last - first, dq);
  }

 private:
  static constexpr int D_SCORES_ROW = KEYS / 2 + 16;

  void read(const HeadRows& from, int i, int rows, int64_t token, int head, float* to, float* to_pairs) {
    bf16* row = reinterpret_cast<bf16*>(to + i * row_);
    copy_row(bf16_row(from, token, head), depth_, 2 * row_, row);
    if (i % 2 || i + 1 == rows) {
      const bf16* before = row - 2 * row_;
      interleave(i % 2 ? before : row, i % 2 ? row : nullptr, depth_, to_pairs + i / 2 * columns_);
    }
  }
  static VOT_INLINE Vec pair(Vec first, Vec second) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(first));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(second));
    return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
  Left left(const float* rows, int row) const { return {rows + row * row_, row_, 1}; }
  const float* panel(const float* panels, int key) const { return panels + key / PANEL * panel_size(pairs_); }
  void add(int rows, Left left, const float* right, int depth, float* sums) const {
    multiply<Pairs>(rows, columns_, left, Right{right, columns_}, depth, Result{sums, columns_}, Old::KEEP);
  }

  const RangeKeysBackward& p_;
  const int kv_head_, depth_, columns_, pairs_, row_;  // row: pairs of a query, in whole sixteens
  float *keys_, *values_, *key_pairs_, *queries_, *d_out_, *query_pairs_, *d_out_pairs_;  // two numbers of bf16 in a float
  float *scores_, *d_weights_, *d_scores_;
};
#endif

}  // namespace VOT_ISA
}  // namespace vot
