// The two products of range attention's forward, queries with keys and weights with values, in two ways.
#pragma once
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
  // Scores, in powers of two when multiplied by factor(), of the rows from `row` on and the keys of the block from
  // `start` to before `stop`, which are multiples of LANES: scores[r * SCORES_ROW + key].
  void scores(int row, int rows, int start, int stop, float* scores) const {
    const Left queries = {queries_ + row * columns_, columns_, 1};
    multiply_panels(rows, start, stop, queries, keys_, depth_, Result{scores, SCORES_ROW});
  }
  VOT_INLINE Vec factor() const { return splat(1); }
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

#ifdef __AMX_BF16__
// In AMX tiles of bf16, with sums in floats: the products of queries and keys are exact, weights are rounded to bf16.
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
  // The factor is above 0, so that the largest product is the largest score: the sign of the scale goes into the query,
  // and so does a scale of 0.
  void read_query(int row, int64_t token, int head) {
    bf16* to = queries_ + row * padded_;
    copy(row_of(p_.q, token, head), to);
    if (p_.scale > 0) return;
    for (int j = 0; j < padded_; j++) put(to + j, (p_.scale == 0 ? 0.f : -1.f) * to_float(to[j]));
  }
  void read_keys(int64_t key, int count) {
    for (int i = 0; i < count; i += 16) read_keys_of_a_tile(key + i, least(16, count - i), keys_ + i * padded_);
    const int pairs = int(round_up(count, 32)) / 2;
    for (int pair = 0; pair < pairs; pair++) {
      const int first = 2 * pair;
      interleave(first < count ? row_of(p_.v, key + first, kv_head_) : nullptr,
                 first + 1 < count ? row_of(p_.v, key + first + 1, kv_head_) : nullptr, values_ + first * columns_);
    }
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
  VOT_INLINE Vec factor() const { return splat(p_.scale == 0 ? 1 : LOG2E * std::fabs(p_.scale)); }
  VOT_INLINE void put_weight(float*, int row, int key, Vec weight) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights_ + row * KEYS + key), (__m256i)_mm512_cvtneps_pbh(weight));
  }
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
  static const bf16* row_of(const HeadRows& rows, int64_t token, int head) {
    return static_cast<const bf16*>(rows.data) + token * rows.token + head * rows.head;
  }
  // LANES numbers of a row, the low halves of 32 bits; 0 past its end.
  __m512i part_of(const bf16* row, int column) const {
    const int count = least(16, depth_ - column);
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), row + column));
  }
  void copy(const bf16* from, bf16* to) const {
    std::memcpy(to, from, sizeof(bf16) * size_t(depth_));
    std::memset(to + depth_, 0, sizeof(bf16) * size_t(padded_ - depth_));
  }
  // to[depth / 2][16][2], zeros for keys past `count`.
  void read_keys_of_a_tile(int64_t key, int count, bf16* to) const {
    alignas(64) bf16 rows[16 * 256];
    for (int i = 0; i < 16; i++) {
      if (i < count) {
        copy(row_of(p_.k, key + i, kv_head_), rows + i * padded_);
      } else {
        std::memset(rows + i * padded_, 0, sizeof(bf16) * size_t(padded_));
      }
    }
    for (int j = 0; j < padded_; j += 32)  // pairs move as floats do
      transpose_16x16(reinterpret_cast<const float*>(rows + j), padded_ / 2, reinterpret_cast<float*>(to + 16 * j), 16);
  }
  // to[column][2] of two rows; null is a row of zeros.
  void interleave(const bf16* first, const bf16* second, bf16* to) const {
    for (int c = 0; c < columns_; c += 16) {
      const __m512i low = first ? part_of(first, c) : __m512i{}, high = second ? part_of(second, c) : __m512i{};
      _mm512_storeu_si512(to + 2 * c, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }

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
