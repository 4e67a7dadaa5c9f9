// The rows of a tensor [tokens, heads, width], one head at a time.
#pragma once
#include "simd.h"

namespace vot {

// The numbers of one row lie side by side. Strides count elements.
struct Rows {
  const void* data;
  int64_t token_stride, head_stride;

  template <class T>
  const T* at(int64_t token, int64_t head) const {
    return static_cast<const T*>(data) + token * token_stride + head * head_stride;
  }
};
struct MutableRows {
  void* data;
  int64_t token_stride, head_stride;

  template <class T>
  T* at(int64_t token, int64_t head) const {
    return static_cast<T*>(data) + token * token_stride + head * head_stride;
  }
};

namespace VOT_ISA {

// visit(column, count) for the vectors of a row; the last one may hold fewer numbers than LANES.
template <class Visit>
VOT_INLINE void for_vectors(int width, const Visit& visit) {
  int c = 0;
  for (; c + LANES <= width; c += LANES) visit(c, LANES);
  if (c < width) visit(c, width - c);
}
// The vector at `column` of a row, 0 where the row ends.
template <class T>
VOT_INLINE Vec load_of(const T* row, int column, int count) {
  return count == LANES ? load(row + column) : load_part(row + column, count);
}
template <class T>
VOT_INLINE void store_of(T* row, Vec x, int column, int count) {
  if (count == LANES) {
    store(row + column, x);
  } else {
    store_part(row + column, x, count);
  }
}

// `to` becomes `row` as floats, with zeros up to whole vectors.
template <class T>
VOT_INLINE void copy_row(const T* row, int width, float* to) {
  for_vectors(width, [&](int c, int count) { store(to + c, load_of(row, c, count)); });
}

// A row of whole vectors, times a factor.
VOT_INLINE void scale_row(float* row, int64_t padded, float factor) {
  for (int64_t c = 0; c < padded; c += LANES) store(row + c, load(row + c) * splat(factor));
}

}  // namespace VOT_ISA
}  // namespace vot
