// Rows of a few heads, taken together: a row of [tokens, heads, width] is read and written as it lies, all heads of it
// before the next, because the rows of one head alone lie too far apart for a processor to fetch them ahead.
//
// In scratch memory they are [head][BLOCK_ROWS][width] floats, each row padded with zeros to whole vectors. The type of
// the numbers is known here alone, so that the kernels are compiled once for all types.
#pragma once
#include "feature_map.h"
#include "tile.h"

namespace vot {
namespace VOT_ISA {

constexpr int BLOCK_ROWS = 64;        // rows that lie in the cache while they are worked on
constexpr int64_t ROW_NUMBERS = 512;  // about how many numbers of a row are read at a time: those of several heads

struct Heads {
  int first, count;
};

// How heads are cut into blocks of about equal size, by key heads; `repeats` query heads share one.
struct HeadCut {
  int kv_heads, repeats, at_once;

  HeadCut(int heads, int kv_heads, int width) : kv_heads(kv_heads), repeats(heads / kv_heads) {
    const int64_t blocks = most<int64_t>(1, (int64_t(heads) * width + ROW_NUMBERS / 2) / ROW_NUMBERS);
    at_once = int((kv_heads + blocks - 1) / blocks);
  }
  int blocks() const { return (kv_heads + at_once - 1) / at_once; }
  Heads keys(int64_t block) const {
    const int first = int(block) * at_once;
    return {first, least(at_once, kv_heads - first)};
  }
  Heads queries(int64_t block) const {
    const Heads keys = this->keys(block);
    return {keys.first * repeats, keys.count * repeats};
  }
};

// phi of `rows` rows from `begin` on, times `scale` and a weight per row and head, `weights` [tokens, all_heads] or null.
VOT_NOINLINE inline void load_features(Dtype dtype, FeatureMap map, const Rows& from, int64_t begin, int rows, Heads heads,
                                       int width, float* to, float scale = 1, const float* weights = nullptr,
                                       int all_heads = 0) {
  const int64_t padded = round_up(width, LANES);
  with_type(dtype, [&](auto zero) {
    const auto row = [&](int r, int h) { return from.at<decltype(zero)>(begin + r, heads.first + h); };
    const auto weight = [&](int r, int h) {
      return scale * (weights ? weights[(begin + r) * all_heads + heads.first + h] : 1);
    };
    const auto out = [&](int r, int h) { return to + (h * BLOCK_ROWS + r) * padded; };
    for (int r = 0; r < rows; r++) {
      int h = 0;
      if (map == FeatureMap::SOFTMAX && width == PAIR_VECTORS * LANES)
        for (; h + 2 <= heads.count; h += 2)
          softmax_of_two<PAIR_VECTORS>({row(r, h), row(r, h + 1)}, {weight(r, h), weight(r, h + 1)},
                                       {out(r, h), out(r, h + 1)});
      for (; h < heads.count; h++) {
        feature_row(map, row(r, h), width, out(r, h));
        if (weight(r, h) != 1) scale_row(out(r, h), padded, weight(r, h));
      }
    }
  });
}

VOT_NOINLINE inline void load_values(Dtype dtype, const Rows& from, int64_t begin, int rows, Heads heads, int width,
                                     float* to) {
  const int64_t padded = round_up(width, LANES);
  with_type(dtype, [&](auto zero) {
    for (int r = 0; r < rows; r++)
      for (int h = 0; h < heads.count; h++)
        copy_row(from.at<decltype(zero)>(begin + r, heads.first + h), width, to + (h * BLOCK_ROWS + r) * padded);
  });
}

// Adds the rows of the block that comes next to what is fetched; not where the heads of a row lie apart.
template <int AT_ONCE>
void fetch_rows(Dtype dtype, const Rows& from, int64_t begin, int64_t end, Heads heads, int width,
                Fetch<AT_ONCE>& fetch) {
  if (from.head_stride != width && heads.count > 1) return;
  with_type(dtype, [&](auto zero) {
    const auto* first = from.at<decltype(zero)>(begin, heads.first);
    const int size = int(sizeof(zero));
    fetch.add(first, from.token_stride * size, int(end - begin), heads.count * width * size);
  });
}

// Each row times a factor, `factors` [head][BLOCK_ROWS] or null. `past_cache`: whoever says so calls finish_streams().
VOT_NOINLINE inline void store_values(Dtype dtype, const float* from, int64_t begin, int rows, Heads heads, int width,
                                      const MutableRows& to, const float* factors = nullptr, bool past_cache = false) {
  const int64_t padded = round_up(width, LANES);
  with_type(dtype, [&](auto zero) {
    for (int r = 0; r < rows; r++)
      for (int h = 0; h < heads.count; h++) {
        const float* row = from + (h * BLOCK_ROWS + r) * padded;
        const Vec factor = splat(factors ? factors[h * BLOCK_ROWS + r] : 1);
        auto* out = to.at<decltype(zero)>(begin + r, heads.first + h);
        const bool aligned = width == padded && uintptr_t(out) % sizeof(Vec) == 0;
        if (past_cache && aligned)
          for (int c = 0; c < width; c += LANES) stream(out + c, load(row + c) * factor);
        else
          for_vectors(width, [&](int c, int count) { store_of(out, load(row + c) * factor, c, count); });
      }
  });
}

}  // namespace VOT_ISA
}  // namespace vot
