// Sine and cosine of a vector of angles, in radians.
#pragma once
#include <cmath>

#include "simd.h"

namespace vot {
namespace VOT_ISA {

// Up to here the distance to the nearest multiple of pi/2 is exact to a rounding.
constexpr float FAST_ANGLES = 65536.f;

// Polynomials on [-pi/4, pi/4] after three subtractions that together take a multiple of pi/2 away. The coefficients
// make the greatest error least: 4e-9 relative for the sine, 1e-10 for the cosine.
VOT_INLINE void fast_sin_cos(Vec angle, Vec* sine, Vec* cosine) {
  const float magic = 12582912.f;  // 1.5 * 2^23: a sum with it has no bits below the integer
  const Vec shifted = angle * splat(0.636619772f) + magic, turns = shifted - magic;
  Vec r = angle - turns * splat(1.5707963705062866f);
  r = r - turns * splat(-4.371138828673793e-08f);
  r = r - turns * splat(-1.7151245100058819e-15f);
  const Vec square = r * r;
  const Vec s = r + r * square * ((splat(-0.00019517299f) * square + 0.00833217815f) * square - 0.166666549f);
  const Vec quartic = (splat(2.44384516e-05f) * square - 0.00138873675f) * square + 0.0416666469f;
  const Vec c = quartic * square * square + (1.f - 0.5f * square);
  const IntVec quarter = (IntVec)shifted;  // its lowest bits are those of the number of quarter turns
  const IntVec odd = (quarter & 1) != 0;
  *sine = (Vec)((IntVec)(odd ? c : s) ^ ((quarter & 2) << 30));
  *cosine = (Vec)((IntVec)(odd ? s : c) ^ (((quarter + 1) & 2) << 30));
}

// The error is that of a rounding or two for any angle.
VOT_INLINE void sin_cos(Vec angle, Vec* sine, Vec* cosine) {
#if VOT_VECTOR_BYTES > 16  // those have fused products, without which the subtractions round
  const Vec size = greater_of(angle, -angle);
  if (!any_greater(size, splat(FAST_ANGLES)) && sum(angle - angle) == 0) return fast_sin_cos(angle, sine, cosine);
#endif
  for (int i = 0; i < LANES; i++) {
    (*sine)[i] = sinf(angle[i]);
    (*cosine)[i] = cosf(angle[i]);
  }
}

}  // namespace VOT_ISA
}  // namespace vot
