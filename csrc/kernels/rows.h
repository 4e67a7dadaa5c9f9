// Going through rows of numbers, a vector at a time.
//
// Large results are written past the cache: then memory does not have to be read first.
#pragma once
#include "dtype.h"
#include "simd.h"

namespace vot {
namespace VOT_ISA {

// Results of at least so many bytes have left the cache when they are read. But a tensor that is larger than what
// malloc keeps comes in new pages from the system, which clears them in the cache just before they are written.
constexpr int64_t BEYOND_CACHE = int64_t(1) << 22, IN_NEW_PAGES = int64_t(1) << 25;

// Whether to write `tensors` results of `bytes` each past the cache.
VOT_INLINE bool passes_cache(int64_t tensors, int64_t bytes) {
  return tensors * bytes >= BEYOND_CACHE && bytes < IN_NEW_PAGES;
}

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

template <class T>
void clear(T* to, int64_t count) {
  if (count > 0) std::memset(to, 0, size_t(count) * sizeof(T));
}

// body(T{}, Constant<whether to write past the cache>{}) for `tensors` results of so many numbers each, whose vectors
// are aligned if their rows of `width` numbers are.
template <class Body>
void with_type_and_writes(Dtype dtype, int64_t tensors, int64_t numbers, int64_t width, const Body& body) {
  with_type(dtype, [&](auto zero) {
    if (passes_cache(tensors, numbers * int64_t(sizeof(zero))) && width % LANES == 0)
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
