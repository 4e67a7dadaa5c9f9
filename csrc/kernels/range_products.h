// The two products of range attention's forward, queries with keys and weights with values, in three ways.
#pragma once
#include "bf16_rows.h"
#include "head_rows.h"
#include "range_attention.h"
#include "space.h"

namespace vot {
namespace VOT_ISA {

constexpr int KEYS = 128;              // of a block of scores
constexpr int SCORES_ROW = KEYS + 16;  // floats from row to row: a power of two would fall into few sets of the cache

// In floats, whatever the types in memory.
class FloatProducts {
 public:
  static constexpr int ROWS = 48;       // of a block of scores
  static constexpr int PAIR_ROWS = 24;  // of one with far pairs: few, so that they see few other near keys than their own

  FloatProducts(const RangeForward& problem, int kv_head, int rows)
      : p_(problem),
        kv_head_(kv_head),
        rows_(rows),
        depth_(problem.head_dim),
        columns_(int(round_up(problem.head_dim, LANES))) {}

  void divide(Space& space) {
    queries_ = space.take(rows_ * columns_);
    keys_ = space.take(KEYS / PANEL * panel_size(depth_));
    values_ = space.take(KEYS * columns_);
  }
  void read_query(int row, int64_t token, int head) {
    read_row(p_.q, token, head, depth_, p_.scale * LOG2E, queries_ + row * columns_);
  }
  // The block of `count` keys from `key` on.
  void read_keys(int64_t key, int count) {
    read_transposed(p_.k, key, count, kv_head_, depth_, keys_);
    for (int i = 0; i < count; i++) read_row(p_.v, key + i, kv_head_, depth_, 1, values_ + i * columns_);
  }
  // Scores, in powers of two once scaled(), of the rows from `row` on and the keys of the block from `start` to before
  // `stop`, which are multiples of LANES: scores[r * SCORES_ROW + key].
  void scores(int row, int rows, int start, int stop, float* scores) const {
    const Left queries = {queries_ + row * columns_, columns_, 1};
    multiply_panels(rows, start, stop, queries, keys_, depth_, Result{scores, SCORES_ROW});
  }
  VOT_INLINE Vec scaled(Vec score) const { return score; }
  // The weights of a row of scores take their place.
  VOT_INLINE void put_weight(float* scores, int row, int key, Vec weight) { store(scores + row * SCORES_ROW + key, weight); }
  // outputs = decays . outputs + weights . values, over the keys of the block from `begin` to before `end`.
  void add_values(int rows, int begin, int end, const float* scores, float* outputs, const float* decays) const {
    multiply(rows, columns_, Left{scores + begin, SCORES_ROW, 1}, Right{values_ + begin * columns_, columns_},
             end - begin, Result{outputs, columns_}, Old::SCALE, decays);
  }

 private:
  const RangeForward& p_;
  const int kv_head_, rows_, depth_, columns_;
  float *queries_, *keys_, *values_;
};

#ifdef __AVX512BF16__
// A score that was found without the scale. The factor is above 0, so that the largest product is the largest score: the
// sign of the scale goes into the query, and so does a scale of 0.
VOT_INLINE Vec scaled_score(Vec score, float scale) {
  return rounded(score * splat(scale == 0 ? 1 : LOG2E * std::fabs(scale)));
}
VOT_INLINE void read_bf16_query(const RangeForward& problem, int64_t token, int head, int padded, bf16* to) {
  copy_row(bf16_row(problem.q, token, head), problem.head_dim, padded, to);
  if (problem.scale > 0) return;
  for (int j = 0; j < padded; j++) put(to + j, (problem.scale == 0 ? 0.f : -1.f) * to_float(to[j]));
}

// In pairs of bf16, with sums in floats: the products of queries and keys are exact, weights are rounded to bf16.
class PairProducts {
 public:
  static constexpr int ROWS = 48, PAIR_ROWS = 24;  // as in floats

  PairProducts(const RangeForward& problem, int kv_head, int rows)
      : p_(problem),
        kv_head_(kv_head),
        rows_(rows),
        depth_(problem.head_dim),
        columns_(int(round_up(problem.head_dim, 16))),
        pairs_((problem.head_dim + 1) / 2),
        row_(int(round_up(problem.head_dim, 32)) / 2) {}

  void divide(Space& space) {
    queries_ = space.take(rows_ * row_);
    keys_ = space.take(KEYS / PANEL * panel_size(pairs_));
    values_ = space.take(KEYS / 2 * columns_);
  }
  void read_query(int row, int64_t token, int head) {
    read_bf16_query(p_, token, head, 2 * row_, reinterpret_cast<bf16*>(queries_ + row * row_));
  }
  void read_keys(int64_t key, int count) {
    read_transposed_pairs(p_.k, key, count, kv_head_, depth_, keys_);
    read_row_pairs(p_.v, key, count, kv_head_, depth_, values_, columns_);
  }
  void scores(int row, int rows, int start, int stop, float* scores) const {
    const Left queries = {queries_ + row * row_, row_, 1};
    multiply_panels<Pairs>(rows, start, stop, queries, keys_, pairs_, Result{scores, SCORES_ROW});
  }
  VOT_INLINE Vec scaled(Vec score) const { return scaled_score(score, p_.scale); }
  // Into the first half of the row, from left to right: no score is overwritten before it is read.
  VOT_INLINE void put_weight(float* scores, int row, int key, Vec weight) {
    put_rounded(reinterpret_cast<bf16*>(scores + row * SCORES_ROW) + key, weight);
  }
  // Keys beside the first and the last are not seen: they weigh 0.
  void add_values(int rows, int begin, int end, const float* scores, float* outputs, const float* decays) const {
    const int first = begin / 2, last = (end + 1) / 2;
    multiply<Pairs>(rows, columns_, Left{scores + first, SCORES_ROW, 1}, Right{values_ + first * columns_, columns_},
                    last - first, Result{outputs, columns_}, Old::SCALE, decays);
  }

 private:
  const RangeForward& p_;
  const int kv_head_, rows_, depth_, columns_, pairs_, row_;  // row: pairs of a query, in whole sixteens
  float *queries_, *keys_, *values_;               // two numbers of bf16 in the place of a float
};
#endif

#ifdef __AMX_BF16__
// The same in AMX tiles.
//
// A tile has 16 rows of 64 bytes. The right operand of a product has its depth in pairs: [depth / 2][columns][2].
class TileProducts {
 public:
  static constexpr int ROWS = 32, PAIR_ROWS = 32;

  TileProducts(const RangeForward& problem, int kv_head, int rows)
      : p_(problem),
        kv_head_(kv_head),
        rows_(rows),
        depth_(problem.head_dim),
        columns_(int(round_up(problem.head_dim, 16))),
        padded_(int(round_up(problem.head_dim, 32))) {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shapes;
    _tile_loadconfig(&shapes);
  }
  ~TileProducts() { _tile_release(); }
  TileProducts(const TileProducts&) = delete;

  void divide(Space& space) {
    queries_ = take(space, (rows_ + 16) * padded_);
    keys_ = take(space, KEYS * padded_);
    values_ = take(space, KEYS * columns_);
    weights_ = take(space, ROWS * KEYS);
    sums_ = space.take(ROWS * columns_);
    if (!space.memory) return;
    std::memset(queries_ + rows_ * padded_, 0, sizeof(bf16) * size_t(16 * padded_));
    std::memset(weights_, 0, sizeof(bf16) * ROWS * KEYS);
  }
  void read_query(int row, int64_t token, int head) {
    read_bf16_query(p_, token, head, padded_, queries_ + row * padded_);
  }
  void read_keys(int64_t key, int count) {
    const auto value = [&](int i) { return i < count ? bf16_row(p_.v, key + i, kv_head_) : nullptr; };
    for (int i = 0; i < count; i += 16) {
      float* to = reinterpret_cast<float*>(keys_ + i * padded_);
      transpose_pairs(p_.k, key + i, least(16, count - i), kv_head_, depth_, to, 16);
    }
    for (int i = 0; i < int(round_up(count, 32)); i += 2)
      interleave(value(i), value(i + 1), depth_, reinterpret_cast<float*>(values_ + i * columns_));
  }
  void scores(int row, int rows, int start, int stop, float* scores) const {
    for (int r = 0; r < rows; r += 32)
      for (int c = start; c < stop; c += 32) {
        const bf16* left = queries_ + (row + r) * padded_;
        const bf16* right = keys_ + c * padded_;
        multiply_tiles(rows - r > 16, stop - c > 16,
                       {left, padded_, right, 32, 16 * padded_, padded_, scores + r * SCORES_ROW + c, SCORES_ROW});
      }
  }
  VOT_INLINE Vec scaled(Vec score) const { return scaled_score(score, p_.scale); }
  VOT_INLINE void put_weight(float*, int row, int key, Vec weight) { put_rounded(weights_ + row * KEYS + key, weight); }
  // Depth comes in 32 keys: those next to the ones that the rows see get the weight 0.
  void add_values(int rows, int begin, int end, const float*, float* outputs, const float* decays) {
    const int first = begin / 32 * 32, last = int(round_up(end, 32));
    for (int r = 0; r < rows; r++) {
      if (begin - first >= LANES) put_weight(nullptr, r, first, Vec{});
      if (last - end >= LANES) put_weight(nullptr, r, last - LANES, Vec{});
    }
    for (int r = 0; r < rows; r += 32)
      for (int c = 0; c < columns_; c += 32) {
        const bf16 *left = weights_ + r * KEYS + first, *right = values_ + first * columns_ + 2 * c;
        multiply_tiles(rows - r > 16, columns_ - c > 16,
                       {left, KEYS, right, 2 * columns_, 32, last - first, sums_ + r * columns_ + c, columns_});
      }
    for (int r = 0; r < rows; r++)
      for (int c = 0; c < columns_; c += LANES) {
        float* out = outputs + r * columns_ + c;
        store(out, load(out) * splat(decays[r]) + load(sums_ + r * columns_ + c));
      }
  }

 private:
  // Of a product of up to 2 x 2 tiles. Rows of the right operand are pairs; its second tile of columns lies `across`
  // numbers after the first.
  struct Operands {
    const bf16* left;
    int left_row;
    const bf16* right;
    int right_row, across, depth;
    float* result;
    int result_row;
  };

  static bf16* take(Space& space, int64_t count) { return reinterpret_cast<bf16*>(space.take((count + 1) / 2)); }

  // result = left . right. The tiles 0 to 3 hold results, 4 and 5 the left operand, 6 and 7 the right. All rows of a
  // tile are computed, those past the last as well: nobody reads them.
  static void multiply_tiles(bool two_rows, bool two_columns, const Operands& of) {
    if (two_rows && two_columns) return multiply_tiles<true, true>(of);
    if (two_rows) return multiply_tiles<true, false>(of);
    if (two_columns) return multiply_tiles<false, true>(of);
    multiply_tiles<false, false>(of);
  }
  template <bool TWO_ROWS, bool TWO_COLUMNS>
  static void multiply_tiles(const Operands& of) {
    const size_t left_row = sizeof(bf16) * size_t(of.left_row), right_row = sizeof(bf16) * size_t(of.right_row);
    const size_t result_row = sizeof(float) * size_t(of.result_row);
    asm volatile("" ::: "memory");  // g++ does not say that loading a tile reads memory: what was stored must be there
    _tile_zero(0);
    if (TWO_COLUMNS) _tile_zero(1);
    if (TWO_ROWS) _tile_zero(2);
    if (TWO_ROWS && TWO_COLUMNS) _tile_zero(3);
    for (int k = 0; k < of.depth; k += 32) {
      const bf16 *left = of.left + k, *right = of.right + k / 2 * of.right_row;
      _tile_loadd(4, left, left_row);
      _tile_loadd(6, right, right_row);
      _tile_dpbf16ps(0, 4, 6);
      if (TWO_COLUMNS) {
        _tile_loadd(7, right + of.across, right_row);
        _tile_dpbf16ps(1, 4, 7);
      }
      if (TWO_ROWS) {
        _tile_loadd(5, left + 16 * of.left_row, left_row);
        _tile_dpbf16ps(2, 5, 6);
        if (TWO_COLUMNS) _tile_dpbf16ps(3, 5, 7);
      }
    }
    float* below = of.result + 16 * of.result_row;
    _tile_stored(0, of.result, result_row);
    if (TWO_COLUMNS) _tile_stored(1, of.result + 16, result_row);
    if (TWO_ROWS) _tile_stored(2, below, result_row);
    if (TWO_ROWS && TWO_COLUMNS) _tile_stored(3, below + 16, result_row);
  }

  const RangeForward& p_;
  const int kv_head_, rows_, depth_, columns_, padded_;
  bf16 *queries_, *keys_, *values_, *weights_;
  float* sums_;
};
#endif

}  // namespace VOT_ISA
}  // namespace vot
