// Tensors [tokens, heads, width] of any floating type, read into blocks of floats and written from them.
#pragma once
#include "dtype.h"
#include "simd.h"
#include "tile.h"

namespace vot {

// A tensor whose columns lie side by side in memory; both strides count elements.
struct HeadRows {
  void* data;
  int64_t token, head;
  Dtype dtype;
};

namespace VOT_ISA {

// body(pointer) with the address of a row in its own type.
template <class Body>
VOT_INLINE auto with_row(const HeadRows& rows, int64_t token, int64_t head, const Body& body) {
  const int64_t at = token * rows.token + head * rows.head;
  switch (rows.dtype) {
    case Dtype::BF16: return body(static_cast<bf16*>(rows.data) + at);
    case Dtype::F16: return body(static_cast<f16*>(rows.data) + at);
    default: return body(static_cast<float*>(rows.data) + at);
  }
}

// to[0 .. round_up(width, LANES)) = factor * from[0 .. width), then zeros.
template <class T>
VOT_INLINE void take_row(const T* from, int width, float factor, float* to) {
  int j = 0;
  for (; j + LANES <= width; j += LANES) store(to + j, load(from + j) * splat(factor));
  if (j < width) store(to + j, load_part(from + j, width - j) * splat(factor));
}
VOT_INLINE void read_row(const HeadRows& rows, int64_t token, int64_t head, int width, float factor, float* to) {
  with_row(rows, token, head, [&](const auto* from) { take_row(from, width, factor, to); });
}
// to[0 .. width) = factor * from[0 .. width).
template <class T>
VOT_INLINE void put_row(T* to, int width, float factor, const float* from) {
  int j = 0;
  for (; j + LANES <= width; j += LANES) store(to + j, load(from + j) * splat(factor));
  if (j < width) store_part(to + j, load(from + j) * splat(factor), width - j);
}
// rows[token, head] = factor * from[0 .. width).
VOT_INLINE void write_row(const HeadRows& rows, int64_t token, int64_t head, int width, float factor, const float* from) {
  with_row(rows, token, head, [&](auto* to) { put_row(to, width, factor, from); });
}
VOT_INLINE void prefetch_row(const HeadRows& rows, int64_t token, int64_t head, int width) {
  with_row(rows, token, head, [&](const auto* from) {
    for (int j = 0; j < width; j += 64 / int(sizeof *from)) __builtin_prefetch(from + j, 0, 2);
  });
}

// A panel holds PANEL rows transposed, [width][PANEL]; panels follow each other `panel_size(width)` floats apart.
constexpr int PANEL = 64;
VOT_INLINE int64_t panel_size(int width) { return round_up(width, 16) * PANEL; }

// Rows `first` to before `first + count` of a head into panels, with zeros up to a multiple of 16 rows.
inline void read_transposed(const HeadRows& rows, int64_t first, int count, int64_t head, int width, float* panels) {
  float padded[16 * 256];
  const int columns = int(round_up(width, 16));
  for (int i = 0; i < count; i += 16) {
    const int some = least(16, count - i);
    const float* from = static_cast<const float*>(rows.data) + (first + i) * rows.token + head * rows.head;
    ptrdiff_t stride = rows.token;
    if (rows.dtype != Dtype::FLOAT || some < 16 || columns > width) {
      from = padded, stride = columns;
      std::memset(padded, 0, sizeof(float) * size_t(16 * columns));
      for (int r = 0; r < some; r++) read_row(rows, first + i + r, head, width, 1.f, padded + r * columns);
    }
    float* to = panels + i / PANEL * panel_size(width) + i % PANEL;
    for (int j = 0; j < columns; j += 16) transpose_16x16(from + j, stride, to + j * PANEL, PANEL);
  }
}

// `count` rows of floats into panels. Rows up to a multiple of 16, and whole blocks of 16 columns, must be there.
inline void transpose_to_panels(const float* rows, ptrdiff_t row, int count, int width, float* panels) {
  for (int i = 0; i < count; i += 16)
    for (int j = 0; j < width; j += 16)
      transpose_16x16(rows + i * row + j, row, panels + i / PANEL * panel_size(width) + i % PANEL + j * PANEL, PANEL);
}

// out[rows x columns] = A[rows x depth] . panels, for columns from `begin` to before `end`, multiples of LANES.
template <class Elements = Floats>
void multiply_panels(int rows, int begin, int end, Left a, const float* panels, int depth, Result out) {
  for (int c = begin; c < end;) {
    const int next = least(end, c / PANEL * PANEL + PANEL);
    const float* panel = panels + c / PANEL * panel_size(depth) + c % PANEL;
    multiply<Elements>(rows, next - c, a, Right{panel, PANEL}, depth, Result{out.data + c, out.row});
    c = next;
  }
}

}  // namespace VOT_ISA
}  // namespace vot
