// Small matrix products, the one inner loop of attention and experts, and the transposes that feed it.
#pragma once
#include "simd.h"

namespace vot {
namespace VOT_ISA {

// A tile of registers has as many vectors in a row as TILE_VECTORS, or fewer. Its sums, a row of the right operand and one
// number of the left fill the registers: 32 of AVX-512, 16 of AVX2.
constexpr int TILE_VECTORS = VOT_VECTOR_BYTES == 64 ? 5 : VOT_VECTOR_BYTES == 32 ? 3 : 4;
constexpr int tile_rows(int vectors) {
  if (VOT_VECTOR_BYTES == 64 && vectors == 5) return 5;
  return VOT_VECTOR_BYTES == 32 && vectors == 3 ? 4 : 6;
}

// The left operand of a product: A[r, k] is at data[r * row + k * column]. Its elements are broadcast, so both strides
// are free, and a transposed matrix costs nothing.
struct Left {
  const float* data;
  ptrdiff_t row, column;
  VOT_INLINE Left below(ptrdiff_t rows) const { return {data + rows * row, row, column}; }
};
// A row-major matrix: element [r, c] is at data[r * row + c].
struct Right {
  const float* data;
  ptrdiff_t row;
};
struct Result {
  float* data;
  ptrdiff_t row;
};

// What becomes of the result's old numbers.
enum class Old { CLEAR, KEEP, SCALE };

// What the elements of both operands are, and how two of them are multiplied.
struct Floats {
  static VOT_INLINE Vec multiply_add(Vec left, Vec right, Vec sum) { return sum + left * right; }
};
#ifdef __AVX512BF16__
// Two numbers of bf16 side by side, which multiply to their scalar product. Pairs are as large as floats and move as
// floats do.
struct Pairs {
  static VOT_INLINE Vec multiply_add(Vec left, Vec right, Vec sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)left, (__m512bh)right);
  }
};
#endif

// A product may bring memory that is worked on next into the cache: then it is read while the product is computed. Each
// tile of registers asks for AT_ONCE rows of it, a piece with every step, because a processor that has asked for many
// lines at a time waits for them.
template <int AT_ONCE>
struct FetchOfTile {
  const char* at[AT_ONCE];
  ptrdiff_t step[AT_ONCE];
  VOT_INLINE void operator()() {
#pragma GCC unroll 4
    for (int i = 0; i < AT_ONCE; i++) {
      __builtin_prefetch(at[i], 0, 2);
      at[i] += step[i];
    }
  }
};
template <int AT_ONCE>
class Fetch {
 public:
  // `rows` rows of `bytes` bytes, `stride` bytes apart. Of four blocks at most; the last one comes first.
  void add(const void* first, ptrdiff_t stride, int rows, int bytes) {
    if (rows > 0) blocks_[count_++] = {static_cast<const char*>(first), stride, rows, bytes};
  }
  // What a tile of `depth` steps asks for; once no row is left, for what is `cached`.
  FetchOfTile<AT_ONCE> next_tile(int depth, const void* cached) {
    FetchOfTile<AT_ONCE> tile;
    for (int i = 0; i < AT_ONCE; i++) {
      tile.at[i] = static_cast<const char*>(cached), tile.step[i] = 0;
      if (!count_) continue;
      Block& block = blocks_[count_ - 1];
      tile.at[i] = block.first, tile.step[i] = (block.bytes + depth - 1) / depth;
      block.first += block.stride;
      if (!--block.rows) count_--;
    }
    return tile;
  }

 private:
  struct Block {
    const char* first;
    ptrdiff_t stride;
    int rows, bytes;
  };
  Block blocks_[4];
  int count_ = 0;
};
struct FetchNothing {
  VOT_INLINE FetchNothing next_tile(int, const void*) const { return {}; }
  VOT_INLINE void operator()() const {}
};

// sums[R][C vectors] += A[R x depth] . B[depth x C vectors]
template <class Elements, int R, int C, class FetchNext>
VOT_INLINE void multiply_add(Left a, Right b, int depth, Vec (&sums)[R][C], FetchNext fetch_next) {
  const float *left = a.data, *right = b.data;
#pragma GCC unroll 1
  for (int k = 0; k < depth; k++) {
    fetch_next();
    Vec columns[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) columns[c] = load(right + c * LANES);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      Vec factor = splat(left[r * a.row]);
      // Keeps the broadcast in a register: the compiler would fold it into each product, a load for every one.
#if VOT_VECTOR_BYTES == 64
      asm("" : "+v"(factor));
#elif VOT_VECTOR_BYTES == 32
      asm("" : "+x"(factor));
#endif
#pragma GCC unroll 8
      for (int c = 0; c < C; c++) sums[r][c] = Elements::multiply_add(factor, columns[c], sums[r][c]);
    }
    left += a.column;
    right += b.row;
  }
}

// Inlined and unrolled, so that neither sums nor arguments pass through memory.
template <class Elements, int R, int C, class Fetching>
VOT_INLINE void multiply_tile(Left a, Right b, int depth, Result out, Old old, const float* scales, Fetching& fetch) {
  Vec sums[R][C] = {};
  multiply_add<Elements, R, C>(a, b, depth, sums, fetch.next_tile(depth, a.data));
  const auto each = [&](const auto& visit) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int c = 0; c < C; c++) visit(sums[r][c], out.data + r * out.row + c * LANES, r);
  };
  // The old numbers come last: the error of a sum over many products is that of sums over few, and of their number.
  if (old == Old::KEEP) each([](Vec& sum, const float* place, int) { sum += load(place); });
  if (old == Old::SCALE) each([&](Vec& sum, const float* place, int r) { sum += splat(scales[r]) * load(place); });
  each([](Vec sum, float* place, int) { store(place, sum); });
}

template <int N>
struct Number {
  static constexpr int value = N;
};

// All rows of a strip of C vectors.
template <class Elements, int C, class Fetching>
VOT_NOINLINE void multiply_strip(int rows, Left a, Right b, int depth, Result out, Old old, const float* scales,
                                 Fetching& fetch) {
  const auto tile = [&](auto height, int r) {
    const Result below = {out.data + r * out.row, out.row};
    const float* own_scales = scales + (old == Old::SCALE ? r : 0);
    multiply_tile<Elements, decltype(height)::value, C>(a.below(r), b, depth, below, old, own_scales, fetch);
  };
  constexpr int R = tile_rows(C);
  int r = 0;
  for (; r + R <= rows; r += R) tile(Number<R>{}, r);
  switch (rows - r) {
    case 5: return tile(Number<5>{}, r);
    case 4: return tile(Number<4>{}, r);
    case 3: return tile(Number<3>{}, r);
    case 2: return tile(Number<2>{}, r);
    case 1: return tile(Number<1>{}, r);
  }
}

// out[rows x columns] = A[rows x depth] . B[depth x columns], added to the old numbers as `old` says, which SCALE
// multiplies by a number per row. `columns` is a multiple of LANES: pad B and out.
template <class Elements = Floats, class Fetching>
void multiply(int rows, int columns, Left a, Right b, int depth, Result out, Old old, const float* scales,
              Fetching& fetch) {
  const auto strip = [&](auto multiply, int c) {
    multiply(rows, a, Right{b.data + c, b.row}, depth, Result{out.data + c, out.row}, old, scales, fetch);
  };
  const int vectors = columns / LANES, strips = (vectors + TILE_VECTORS - 1) / TILE_VECTORS;
  for (int i = 0, c = 0; i < strips; i++) {  // of about equal width
    const int width = (vectors - c / LANES + strips - i - 1) / (strips - i);
    switch (width) {
      case 5: strip(multiply_strip<Elements, least(5, TILE_VECTORS), Fetching>, c); break;
      case 4: strip(multiply_strip<Elements, least(4, TILE_VECTORS), Fetching>, c); break;
      case 3: strip(multiply_strip<Elements, 3, Fetching>, c); break;
      case 2: strip(multiply_strip<Elements, 2, Fetching>, c); break;
      default: strip(multiply_strip<Elements, 1, Fetching>, c);
    }
    c += width * LANES;
  }
}

template <class Elements = Floats>
void multiply(int rows, int columns, Left a, Right b, int depth, Result out, Old old = Old::CLEAR,
              const float* scales = nullptr) {
  FetchNothing nothing;
  multiply<Elements>(rows, columns, a, b, depth, out, old, scales, nothing);
}

#if VOT_VECTOR_BYTES == 32
// to[c * to_row + r] = from[r * from_row + c] for 8 x 8 floats.
VOT_INLINE void transpose_8x8(const float* from, ptrdiff_t from_row, float* to, ptrdiff_t to_row) {
  __m256 rows[8], pairs[8], fours[8];
  for (int i = 0; i < 8; i++) rows[i] = _mm256_loadu_ps(from + i * from_row);
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    fours[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    fours[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    fours[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    fours[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
  for (int i = 0; i < 4; i++) {
    _mm256_storeu_ps(to + i * to_row, _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * to_row, _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31));
  }
}
#endif

// to[c * to_row + r] = from[r * from_row + c] for 16 x 16 floats.
VOT_INLINE void transpose_16x16(const float* from, ptrdiff_t from_row, float* to, ptrdiff_t to_row) {
#if VOT_VECTOR_BYTES == 64
  __m512 rows[16], next[16];
  const auto low = [](__m512 a, __m512 b) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
  const auto high = [](__m512 a, __m512 b) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
  for (int i = 0; i < 16; i++) rows[i] = _mm512_loadu_ps(from + i * from_row);
  for (int i = 0; i < 8; i++) {  // pairs of floats
    next[2 * i] = _mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
    next[2 * i + 1] = _mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {  // fours
    rows[i] = low(next[i], next[i + 2]);
    rows[i + 1] = high(next[i], next[i + 2]);
    rows[i + 2] = low(next[i + 1], next[i + 3]);
    rows[i + 3] = high(next[i + 1], next[i + 3]);
  }
  for (int i = 0; i < 4; i++) {  // eights
    next[i] = _mm512_shuffle_f32x4(rows[i], rows[i + 4], 0x88);
    next[i + 4] = _mm512_shuffle_f32x4(rows[i], rows[i + 4], 0xdd);
    next[i + 8] = _mm512_shuffle_f32x4(rows[i + 8], rows[i + 12], 0x88);
    next[i + 12] = _mm512_shuffle_f32x4(rows[i + 8], rows[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; i++) {
    _mm512_storeu_ps(to + i * to_row, _mm512_shuffle_f32x4(next[i], next[i + 8], 0x88));
    _mm512_storeu_ps(to + (i + 8) * to_row, _mm512_shuffle_f32x4(next[i], next[i + 8], 0xdd));
  }
#elif VOT_VECTOR_BYTES == 32
  for (int r = 0; r < 16; r += 8)
    for (int c = 0; c < 16; c += 8) transpose_8x8(from + r * from_row + c, from_row, to + c * to_row + r, to_row);
#else
  for (int r = 0; r < 16; r++)
    for (int c = 0; c < 16; c++) to[c * to_row + r] = from[r * from_row + c];
#endif
}

// to[c * to_row + r] = from[r * from_row + c]. Each row of `to` ends with zeros, up to whole vectors.
inline void transpose(int rows, int columns, const float* from, ptrdiff_t from_row, float* to, ptrdiff_t to_row) {
  const int whole_rows = rows / 16 * 16, whole_columns = columns / 16 * 16, padded = int(round_up(rows, LANES));
  for (int r = 0; r < whole_rows; r += 16)
    for (int c = 0; c < whole_columns; c += 16)
      transpose_16x16(from + r * from_row + c, from_row, to + c * to_row + r, to_row);
  const auto rest = [&](int row, int column) {
    for (int c = column; c < columns; c++) {
      float* out = to + c * to_row;
      for (int r = row; r < rows; r++) out[r] = from[r * from_row + c];
    }
  };
  rest(whole_rows, 0);
  rest(0, whole_columns);
  for (int c = 0; c < columns; c++)
    for (int r = rows; r < padded; r++) to[c * to_row + r] = 0;
}

}  // namespace VOT_ISA
}  // namespace vot
