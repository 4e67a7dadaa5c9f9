// Vectors of floats, as wide as the instruction set that this translation unit is compiled for.
//
// Kernel files are compiled once per instruction set, each time with VOT_ISA as the name of their namespace. No
// template of the standard library may be used in them: the linker keeps one copy of a template's function for the whole
// library, and if that is the copy compiled for AVX-512, a processor without it fails anywhere.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "dtype.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define VOT_VECTOR_BYTES 64
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define VOT_VECTOR_BYTES 32
#else
#define VOT_VECTOR_BYTES 16
#endif
#ifndef VOT_ISA
#define VOT_ISA generic
#endif
#define VOT_INLINE inline __attribute__((always_inline))
#define VOT_NOINLINE __attribute__((noinline))

namespace vot {
namespace VOT_ISA {

constexpr int LANES = VOT_VECTOR_BYTES / 4;
constexpr float INF = __builtin_inff();
constexpr float LOG2E = 1.44269504088896341f, LN2 = 0.693147180559945309f;

typedef float Vec __attribute__((vector_size(VOT_VECTOR_BYTES)));
typedef float UnalignedVec __attribute__((vector_size(VOT_VECTOR_BYTES), aligned(1), may_alias));
typedef int32_t IntVec __attribute__((vector_size(VOT_VECTOR_BYTES)));
typedef uint32_t BitVec __attribute__((vector_size(VOT_VECTOR_BYTES)));  // of which a sum may overflow

template <class T>
VOT_INLINE constexpr T least(T a, T b) {
  return b < a ? b : a;
}
template <class T>
VOT_INLINE constexpr T most(T a, T b) {
  return a < b ? b : a;
}
// The least multiple of `step` that is not below x.
VOT_INLINE int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

VOT_INLINE Vec splat(float x) { return x - Vec{}; }
// x as a float, where the compiler would else add to a product that it has not rounded.
VOT_INLINE Vec rounded(Vec x) {
#if VOT_VECTOR_BYTES == 64
  asm("" : "+v"(x));
#elif VOT_VECTOR_BYTES == 32
  asm("" : "+x"(x));
#endif
  return x;
}
VOT_INLINE IntVec lane_numbers() {
  IntVec numbers;
  for (int i = 0; i < LANES; i++) numbers[i] = i;
  return numbers;
}

#if defined(__aarch64__)
typedef __fp16 Binary16;  // g++ has _Float16 there from version 13 on
#else
typedef _Float16 Binary16;
#endif

VOT_INLINE float to_float(float x) { return x; }
VOT_INLINE float to_float(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
VOT_INLINE float to_float(f16 x) {
  Binary16 half;
  std::memcpy(&half, &x.bits, 2);
  return float(half);
}
VOT_INLINE void put(float* to, float x) { *to = x; }
VOT_INLINE void put(bf16* to, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  // Rounds to nearest, ties to even. NaN stays NaN.
  to->bits = x == x ? uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : uint16_t(0x7fc0);
}
VOT_INLINE void put(f16* to, float x) {
  const Binary16 half = Binary16(x);
  std::memcpy(&to->bits, &half, 2);
}

// LANES values from memory as float, and back. The addresses need no alignment.
VOT_INLINE Vec load(const float* from) { return *reinterpret_cast<const UnalignedVec*>(from); }
VOT_INLINE void store(float* to, Vec x) { *reinterpret_cast<UnalignedVec*>(to) = x; }
#if VOT_VECTOR_BYTES == 64
VOT_INLINE Vec load(const bf16* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
VOT_INLINE void store(bf16* to, Vec x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i rounded = _mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), is_nan, _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(rounded));
}
VOT_INLINE Vec load(const f16* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
VOT_INLINE void store(f16* to, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
#elif VOT_VECTOR_BYTES == 32
VOT_INLINE Vec load(const bf16* from) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
VOT_INLINE void store(bf16* to, Vec x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i rounded = _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), _mm256_set1_epi32(0x7fc0), is_nan);
  const __m128i low = _mm256_castsi256_si128(rounded), high = _mm256_extracti128_si256(rounded, 1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_packus_epi32(low, high));
}
VOT_INLINE Vec load(const f16* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
VOT_INLINE void store(f16* to, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
#else
template <class T>
VOT_INLINE Vec load(const T* from) {
  Vec x;
  for (int i = 0; i < LANES; i++) x[i] = to_float(from[i]);
  return x;
}
template <class T>
VOT_INLINE void store(T* to, Vec x) {
  for (int i = 0; i < LANES; i++) put(to + i, x[i]);
}
#endif

// The first `count` (up to LANES) values from memory, and 0 after them; and back. Nothing beyond is touched.
template <class T>
VOT_INLINE Vec load_part(const T* from, int count) {
  T values[LANES] = {};
  std::memcpy(values, from, size_t(count) * sizeof(T));
  return load(values);
}
template <class T>
VOT_INLINE void store_part(T* to, Vec x, int count) {
  T values[LANES];
  store(values, x);
  std::memcpy(to, values, size_t(count) * sizeof(T));
}
#if VOT_VECTOR_BYTES == 64
VOT_INLINE Vec load_part(const float* from, int count) {
  return _mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), from);
}
VOT_INLINE void store_part(float* to, Vec x, int count) {
  _mm512_mask_storeu_ps(to, __mmask16((1u << count) - 1), x);
}
#elif VOT_VECTOR_BYTES == 32
VOT_INLINE Vec load_part(const float* from, int count) {
  return _mm256_maskload_ps(from, __m256i(lane_numbers() < (IntVec{} + count)));
}
VOT_INLINE void store_part(float* to, Vec x, int count) {
  _mm256_maskstore_ps(to, __m256i(lane_numbers() < (IntVec{} + count)), x);
}
#endif

// The greater of each pair; b where one of them is NaN.
VOT_INLINE Vec greater_of(Vec a, Vec b) {
#if VOT_VECTOR_BYTES == 64
  return _mm512_max_ps(a, b);
#elif VOT_VECTOR_BYTES == 32
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
VOT_INLINE bool any_greater(Vec a, Vec b) {
#if VOT_VECTOR_BYTES == 64
  return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0;
#elif VOT_VECTOR_BYTES == 32
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0;
#else
  const IntVec greater = a > b;
  int found = 0;
  for (int i = 0; i < LANES; i++) found |= greater[i];
  return found != 0;
#endif
}
VOT_INLINE float greatest(Vec x) {
#if VOT_VECTOR_BYTES == 64
  return _mm512_reduce_max_ps(x);
#elif VOT_VECTOR_BYTES == 32
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
#else
  float result = x[0];
  for (int i = 1; i < LANES; i++) result = most(result, x[i]);
  return result;
#endif
}
VOT_INLINE float sum(Vec x) {
#if VOT_VECTOR_BYTES == 64
  return _mm512_reduce_add_ps(x);
#elif VOT_VECTOR_BYTES == 32
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
#else
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; i++) x[i] += x[i + half];
  return x[0];
#endif
}

// Writes past the cache, for results larger than it that are not read soon. `to` is aligned to a vector. Whoever
// streams calls finish_streams() before another thread may read.
VOT_INLINE void stream(float* to, Vec x) {
#if VOT_VECTOR_BYTES == 64
  _mm512_stream_ps(to, x);
#elif VOT_VECTOR_BYTES == 32
  _mm256_stream_ps(to, x);
#else
  store(to, x);
#endif
}
template <class Half>
VOT_INLINE void stream(Half* to, Vec x) {
  store(to, x);
}
VOT_INLINE void finish_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

constexpr float MAGIC = 12582912.f;  // 1.5 * 2^23: a sum with it has no bits below the integer

// 2^x with a relative error below 3e-7, for x up to 127; 0 for x = -inf and for results below 2^-126. A minimax
// polynomial of degree 5 on [-1/2, 1/2]. Lanes that nobody reads may hold any bits.
VOT_INLINE Vec exp2(Vec x) {
  const auto polynomial = [](Vec r) {
    Vec p = splat(0.00132764183f) * r + 0.00967554105f;
    p = p * r + 0.0555071344f;
    p = p * r + 0.240221197f;
    p = p * r + 0.693146967f;
    return p * r + 1.00000007f;
  };
#if VOT_VECTOR_BYTES == 64
  const Vec fraction = _mm512_reduce_ps(x, 0);  // x minus the nearest integer
  return _mm512_scalef_ps(polynomial(fraction), x - fraction);
#else
  x = greater_of(splat(-127.f), x);  // in this order, which keeps NaN
  const Vec shifted = x + MAGIC, whole = shifted - MAGIC;
  const BitVec exponent = ((BitVec)shifted << 23) + (127u << 23);
  return polynomial(x - whole) * (Vec)exponent;
#endif
}

// e^x to about one rounding, for x up to 70; results below 2^-126 keep the digits that they can have. e^r is
// 1 + r + r^2 q(r) for |r| <= ln(2) / 2 with a minimax polynomial q of degree 4.
VOT_INLINE Vec exp(Vec x) {
  x = greater_of(splat(-104.f), x);  // whose exponential rounds to 0
  const Vec shifted = x * splat(LOG2E) + MAGIC, whole = shifted - MAGIC;
  const Vec r = (x - whole * 0.693359375f) - whole * -2.12194440e-4f;  // ln 2 in two parts: the first product is exact
  Vec q = splat(0.00138145406f) * r + 0.00836874545f;
  q = q * r + 0.041668389f;
  q = q * r + 0.166665211f;
  q = q * r + 0.49999994f;
  const Vec p = (q * r + 1.f) * r + 1.f;
#if VOT_VECTOR_BYTES == 64
  return _mm512_scalef_ps(p, whole);
#else
  const BitVec power = ((BitVec)shifted << 23) + ((127u + 25) << 23);  // of 2^(whole + 25), which is never subnormal
  return p * (Vec)power * 0x1p-25f;
#endif
}

}  // namespace VOT_ISA
}  // namespace vot
