// Going through rows of numbers, a vector at a time.
//
// Results that are larger than the cache are written past it: then memory does not have to be read first.
#pragma once
#include "dtype.h"
#include "simd.h"

namespace vot {
namespace VOT_ISA {

constexpr int64_t BEYOND_CACHE = int64_t(1) << 23;  // bytes of a result that has left the cache when it is read

template <bool VALUE>
struct Constant {
  static constexpr bool value = VALUE;
};

// A whole vector of a row. Where PAST_CACHE, it is aligned.
template <bool PAST_CACHE>
struct Whole {
  template <class T>
  VOT_INLINE Vec get(const T* from) const {
    return load(from);
  }
  template <class T>
  VOT_INLINE void set(T* to, Vec x) const {
    if constexpr (PAST_CACHE)
      stream(to, x);
    else
      store(to, x);
  }
};

// The end of a row.
struct Part {
  int count;
  template <class T>
  VOT_INLINE Vec get(const T* from) const {
    return load_part(from, count);
  }
  template <class T>
  VOT_INLINE void set(T* to, Vec x) const {
    store_part(to, x, count);
  }
};

// body(i, part) for i = 0, LANES, 2 LANES, ... below count, where `part` reads and writes the numbers from i on.
template <bool PAST_CACHE, class Body>
VOT_INLINE void for_vectors(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) body(i, Whole<PAST_CACHE>{});
  if (i < count) body(i, Part{int(count - i)});
}

// body(T{}, Constant<whether to write past the cache>{}) for a result of so many numbers, whose vectors are aligned if
// its rows of `width` numbers are.
template <class Body>
void with_type_and_writes(Dtype dtype, int64_t numbers, int64_t width, const Body& body) {
  with_type(dtype, [&](auto zero) {
    if (numbers * int64_t(sizeof(zero)) >= BEYOND_CACHE && width % LANES == 0)
      body(zero, Constant<true>{});
    else
      body(zero, Constant<false>{});
  });
}

// The last i below count with bounds[i] <= x, for bounds that rise, the first of them at most x.
template <class Int>
int64_t last_at_or_below(const Int* bounds, int64_t count, int64_t x) {
  int64_t low = 0, high = count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (bounds[middle] <= x ? low : high) = middle;
  }
  return low;
}

}  // namespace VOT_ISA
}  // namespace vot
