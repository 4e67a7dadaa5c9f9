// Rows of bf16 as operands of products whose elements are pairs.
#pragma once
#include "head_rows.h"

#ifdef __AVX512BF16__
namespace vot {
namespace VOT_ISA {

inline bool is_bf16(const HeadRows& rows) { return rows.dtype == Dtype::BF16; }
VOT_INLINE const bf16* bf16_row(const HeadRows& rows, int64_t token, int64_t head) {
  return static_cast<const bf16*>(rows.data) + token * rows.token + head * rows.head;
}

// to[0 .. padded) = from[0 .. width), then zeros; null is a row of zeros.
VOT_INLINE void copy_row(const bf16* from, int width, int padded, bf16* to) {
  const int kept = from ? width : 0;
  if (kept) std::memcpy(to, from, sizeof(bf16) * size_t(kept));
  std::memset(to + kept, 0, sizeof(bf16) * size_t(padded - kept));
}

// to[pair * to_row + i] = the numbers 2 pair and 2 pair + 1 of row `first + i`, for 16 rows and as many pairs as hold
// `width` numbers, in whole sixteens. Numbers past the end are 0, and so are rows past `count`.
inline void transpose_pairs(const HeadRows& rows, int64_t first, int count, int64_t head, int width, float* to,
                            ptrdiff_t to_row) {
  alignas(64) bf16 copies[16 * 256];
  const int padded = int(round_up(width, 32));
  for (int i = 0; i < 16; i++)
    copy_row(i < count ? bf16_row(rows, first + i, head) : nullptr, width, padded, copies + i * padded);
  for (int pair = 0; pair < padded / 2; pair += 16)
    transpose_16x16(reinterpret_cast<const float*>(copies) + pair, padded / 2, to + pair * to_row, to_row);
}

// 16 numbers of a row from `column` on, each in the low half of 32 bits; 0 past its end.
VOT_INLINE __m512i low_halves(const bf16* row, int column, int width) {
  const int count = least(16, width - column);
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), row + column));
}

// to[column] = the numbers `column` of two rows, in whole sixteens; null is a row of zeros.
VOT_INLINE void interleave(const bf16* first, const bf16* second, int width, float* to) {
  for (int c = 0; c < width; c += 16) {
    const __m512i low = first ? low_halves(first, c, width) : __m512i{};
    const __m512i high = second ? low_halves(second, c, width) : __m512i{};
    _mm512_storeu_si512(to + c, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
}

// Rows `first` to before `first + count` of a head into panels of pairs, with zeros up to a multiple of 16 rows.
inline void read_transposed_pairs(const HeadRows& rows, int64_t first, int count, int64_t head, int width, float* panels) {
  const int pairs = (width + 1) / 2;
  for (int i = 0; i < count; i += 16) {
    float* to = panels + i / PANEL * panel_size(pairs) + i % PANEL;
    transpose_pairs(rows, first + i, least(16, count - i), head, width, to, PANEL);
  }
}
// The same rows in pairs of them, to[pair][to_row]; the last without another is beside a row of zeros.
inline void read_row_pairs(const HeadRows& rows, int64_t first, int count, int64_t head, int width, float* to, int to_row) {
  const auto row = [&](int i) { return i < count ? bf16_row(rows, first + i, head) : nullptr; };
  for (int i = 0; i < count; i += 2) interleave(row(i), row(i + 1), width, to + i / 2 * to_row);
}

// to[0 .. LANES) = x, rounded.
VOT_INLINE void put_rounded(bf16* to, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x));
}

}  // namespace VOT_ISA
}  // namespace vot
#endif
