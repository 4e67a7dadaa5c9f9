// What the kernels of experts are made of: blocks of an expert's places, and products with panels of their rows.
//
// Products are computed transposed, W . rows^T: weights are the operand whose elements are broadcast, so they are read
// as they lie in any layout, and rows are brought together in the transpose.
#pragma once
#include "experts.h"
#include "scratch.h"
#include "tile.h"

namespace vot {
namespace VOT_ISA {

constexpr int PANEL = 64;    // places of a panel, [depth][PANEL] floats
constexpr int UNIT = 16;     // panels are filled to a multiple of it
constexpr int BLOCK = 256;   // places of a task, at most
constexpr int STRIP = 48;    // rows of a product that are computed and used up at a time
constexpr int DEPTH = 128;   // depth of a product at a time: so much of a panel stays in the innermost cache

// Successive places of one expert.
struct Block {
  int expert;
  int64_t first;  // place
  int count;      // places of the block
  int panels, width;
  int64_t number = 0;  // of all blocks

  int filled(int panel) const { return least(width, count - panel * width); }
  // Numbers that lie in panels, from this one on: [rows][filled].
  template <class T>
  T* in_panel(T* data, int rows, int panel) const {
    return data + (first + panel * width) * rows;
  }
};

// `count` in parts of equal size, at most `most` and a multiple of UNIT: the size.
VOT_INLINE int even_part(int64_t count, int most) {
  const int64_t parts = (count + most - 1) / most;
  return int(round_up((count + parts - 1) / parts, UNIT));
}

VOT_INLINE int64_t blocks_of_expert(const ExpertSlots& slots, int expert) {
  return (slots.offsets[expert + 1] - slots.offsets[expert] + BLOCK - 1) / BLOCK;
}
inline int64_t count_blocks(const ExpertSlots& slots) {
  int64_t blocks = 0;
  for (int e = 0; e < slots.experts; e++) blocks += blocks_of_expert(slots, e);
  return blocks;
}
inline Block find_block(const ExpertSlots& slots, int64_t number) {
  int expert = 0;
  int64_t within = number;
  for (; within >= blocks_of_expert(slots, expert); expert++) within -= blocks_of_expert(slots, expert);
  const int64_t start = slots.offsets[expert], places = slots.offsets[expert + 1] - start;
  const int64_t size = even_part(places, BLOCK), begin = within * size;
  const int count = int(least(size, places - begin)), width = even_part(count, PANEL);
  return {expert, start + begin, count, (count + width - 1) / width, width, number};
}

VOT_INLINE Left of_expert(const ExpertMatrices& w, int expert) { return {w.data + expert * w.expert, w.row, w.column}; }
VOT_INLINE Left transposed(Left a) { return {a.data, a.column, a.row}; }

// Floats of a panel and of all panels of a block.
VOT_INLINE int64_t panel_size(int64_t depth) { return round_up(depth, UNIT) * PANEL; }
VOT_INLINE int64_t panels_size(int64_t depth) { return panel_size(depth) * (BLOCK / PANEL); }

// 16 floats, of which the first `count` are read or written.
VOT_INLINE void copy_16(const float* from, float* to, int count) {
  for (int c = 0; c < 16; c += LANES) {
    if (count >= c + LANES) store(to + c, load(from + c));
    else if (count > c) store_part(to + c, load_part(from + c, count - c), count - c);
  }
}

// panels[depth][PANEL] = the rows row_of(i) of the block's places i, transposed. Columns that are only there to fill up
// are copies of others.
template <class RowOf>
VOT_NOINLINE void gather(const Block& block, int depth, const RowOf& row_of, float* panels) {
  alignas(64) float rows[16 * 16];
  for (int p = 0; p < block.panels; p++)
    for (int i = 0; i < block.filled(p); i += 16) {
      const float* from[16];
      for (int r = 0; r < 16; r++) from[r] = row_of(least(p * block.width + i + r, block.count - 1));
      for (int d = 0; d < depth; d += 16) {
        for (int r = 0; r < 16; r++) copy_16(from[r] + d, rows + r * 16, depth - d);
        transpose_16x16(rows, 16, panels + p * panel_size(depth) + d * PANEL + i, PANEL);
      }
    }
}

// The panels of `rows` at the tokens of the block's slots, or at the slots themselves.
inline void gather_tokens(const Block& block, const ExpertSlots& slots, ExpertRows rows, int depth, float* panels) {
  gather(block, depth, [&](int i) { return rows.data + slots.order[block.first + i] / slots.top_k * rows.row; }, panels);
}
inline void gather_slots(const Block& block, const ExpertSlots& slots, ExpertRows rows, int depth, float* panels) {
  gather(block, depth, [&](int i) { return rows.data + slots.order[block.first + i] * rows.row; }, panels);
}

// The same 16 floats, added.
VOT_INLINE void add_16(const float* from, float* to, int count) {
  for (int c = 0; c < 16; c += LANES) {
    if (count >= c + LANES) store(to + c, load(to + c) + load(from + c));
    else if (count > c) store_part(to + c, load_part(to + c, count - c) + load_part(from + c, count - c), count - c);
  }
}

// to[rows][to_row] = from[rows][from_row], the first `columns` of each row, or added.
template <bool ADD = false>
VOT_INLINE void copy_rows(const float* from, int64_t from_row, int rows, int columns, float* to, int64_t to_row) {
  for (int r = 0; r < rows; r++)
    for (int c = 0; c < columns; c += 16) {
      if (ADD) add_16(from + r * from_row + c, to + r * to_row + c, columns - c);
      else copy_16(from + r * from_row + c, to + r * to_row + c, columns - c);
    }
}

// row_of(i)[0 .. rows) = column i of a panel [rows][PANEL], for the first `count` columns. Rows are written one after the
// other: they are far apart.
template <bool ADD = false, class RowOf>
VOT_INLINE void scatter_panel(const float* panel, int rows, int count, const RowOf& row_of) {
  alignas(64) float turned[16 * 16];
  for (int c = 0; c < count; c += 16)
    for (int r = 0; r < rows; r += 16) {
      transpose_16x16(panel + r * PANEL + c, PANEL, turned, 16);
      for (int i = 0; i < least(16, count - c); i++)
        copy_rows<ADD>(turned + i * 16, 0, 1, least(16, rows - r), row_of(c + i) + r, 0);
    }
}

// out[slot] = the columns of panels[p][width][PANEL] of the block, or added.
template <bool ADD = false>
inline void scatter_slots(const Block& block, const ExpertSlots& slots, const float* panels, int width, float* out) {
  for (int p = 0; p < block.panels; p++) {
    const int32_t* slot = slots.order + block.first + p * block.width;
    scatter_panel<ADD>(panels + p * panel_size(width), width, block.filled(p),
                       [&](int i) { return out + int64_t(slot[i]) * width; });
  }
}

constexpr int SLICE = 24;  // rows of a strip that are computed between two requests for weights

// Asks for the first DEPTH numbers of rows `from` to before `to`.
VOT_INLINE void prefetch_rows(Left w, int from, int to) {
  for (int r = from; r < to; r++)
    for (int k = 0; k < DEPTH; k += 16) __builtin_prefetch(w.data + r * w.row + k, 0, 2);
}

// sums[p][rows][PANEL] = W[rows x depth] . panels[p][depth][PANEL] for the panels of a block, `stride` numbers apart.
inline void product(const Block& block, Left w, int rows, int depth, const float* panels, float* sums,
                    int64_t stride = STRIP * PANEL, Old old = Old::CLEAR) {
  alignas(64) float packed[STRIP * DEPTH];
  for (int k = 0; k == 0 || k < depth; k += DEPTH, old = Old::KEEP) {
    const int part = least(DEPTH, depth - k);
    Left a = {w.data + k * w.column, w.row, w.column};
    if (w.row == 1 && w.column != 1) {  // the numbers of a column lie side by side: columns are brought together
      copy_rows(a.data, a.column, part, rows, packed, STRIP);
      a = {packed, 1, STRIP};
    }
    // What is multiplied next, if these are successive strips, is asked for meanwhile: memory is slow to find so many rows.
    const Left next = k + DEPTH < depth ? Left{w.data + (k + DEPTH) * w.column, w.row, w.column} : w.below(STRIP);
    for (int p = 0; p < block.panels; p++)
      for (int r = 0; r < rows; r += SLICE) {
        if (w.column == 1) prefetch_rows(next, r + SLICE * p / block.panels, r + SLICE * (p + 1) / block.panels);
        multiply(least(SLICE, rows - r), int(round_up(block.filled(p), UNIT)), a.below(r),
                 {panels + p * panel_size(depth) + k * PANEL, PANEL}, part, {sums + p * stride + r * PANEL, PANEL}, old);
      }
  }
}

// body(row, rows) for each strip of `rows` rows.
template <class Body>
VOT_INLINE void for_strips(int rows, const Body& body) {
  for (int r = 0; r < rows; r += STRIP) body(r, least(STRIP, rows - r));
}
constexpr int64_t STRIPS_SIZE = BLOCK / PANEL * STRIP * PANEL;  // floats of a strip of every panel

// out[p][width][PANEL] (+)= W[width x depth] . panels[p][depth][PANEL], all of it.
inline void whole_product(const Block& block, Left w, int width, int depth, const float* panels, float* out,
                          Old old = Old::CLEAR) {
  for_strips(width, [&](int r, int rows) {
    product(block, w.below(r), rows, depth, panels, out + r * PANEL, panel_size(width), old);
  });
}

VOT_INLINE Vec sigmoid(Vec x) {
  // The exponent is limited to what exp2 takes. NaN stays NaN.
  return splat(1.f) / (exp2(-greater_of(splat(-126.f), x * splat(LOG2E))) + 1.f);
}

}  // namespace VOT_ISA
}  // namespace vot
