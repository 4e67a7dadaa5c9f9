// Gradients of the experts' weights, and the groups of places that the backwards go through.
//
// What a group's blocks leave for the gradients of the weights lies in memory of the calling thread, which is bounded.
// The left operand lies in panels, as the products of the blocks left it: its elements are broadcast in either layout.
// Gradients are summed in the tensors themselves, whose memory is touched once for each block of an expert.
#pragma once
#include "experts_blocks.h"

namespace vot {
namespace VOT_ISA {

constexpr int64_t GROUP = 4096;  // columns of a group, about

// Successive blocks, and the experts that have some of them. What the blocks leave lies in columns, enough for their
// places and for a panel more in each block: panels are filled up.
struct Group {
  int64_t first_block, blocks;
  int64_t first, places;
  int first_expert, experts;

  int64_t columns() const { return columns_before(first + places, first_block + blocks); }
  int64_t columns_before(int64_t place, int64_t block) const { return place - first + PANEL * (block - first_block); }
  // Where the block's panels [rows] begin, of all panels of the group, which `columns() * padded(rows)` floats hold.
  template <class T>
  T* in_panels(T* data, int rows, const Block& block) const {
    return data + columns_before(block.first, block.number) * padded(rows);
  }
  static int64_t padded(int rows) { return round_up(rows, UNIT); }
};

// body(group) for all blocks, in groups that do not depend on the number of threads.
template <class Body>
void for_groups(const ExpertSlots& slots, const Body& body) {
  const int64_t blocks = count_blocks(slots);
  for (int64_t first = 0, next; first < blocks; first = next) {
    const Block begin = find_block(slots, first);
    Group group = {first, 1, begin.first, begin.count, begin.expert, 1};
    for (next = first + 1; next < blocks; next++) {
      const Block block = find_block(slots, next);
      const int64_t places = block.first + block.count - begin.first;
      const Group larger = {first, next + 1 - first, begin.first, places, begin.expert, block.expert + 1 - begin.expert};
      if (larger.columns() > GROUP) break;
      group = larger;
    }
    body(group);
  }
}

// A row for each place of a group, found by its number among the group's columns, by its slot or by its token.
struct PlaceRows {
  ExpertRows rows;
  int width;
  enum { COLUMN, SLOT, TOKEN } by;

  const float* at(const ExpertSlots& slots, const Group& group, const Block& block, int i) const {
    if (by == COLUMN) return rows.data + (group.columns_before(block.first, block.number) + i) * rows.row;
    const int64_t slot = slots.order[block.first + i];
    return rows.data + (by == SLOT ? slot : slot / slots.top_k) * rows.row;
  }
};

// out[r, c] of each expert = sum over its places of left[r] * right[c], where `left` lies in the group's panels [rows].
// The numbers of a row of `out` lie side by side.
struct Gradient {
  const float* left;
  int rows;
  PlaceRows right;
  float* out;
  int64_t expert, row;
};

VOT_INLINE Gradient gradient(int rows, PlaceRows right, ExpertGradients out) {
  return {nullptr, rows, right, out.data, out.expert, out.row};
}

// A rectangle of an expert's gradient is a task.
constexpr int GRADIENT_ROWS = 16 * STRIP, GRADIENT_COLUMNS = 8 * PANEL;
struct Rectangle {
  int expert, row, rows, column, columns;
};
VOT_INLINE int rectangles_across(const Gradient& g) {
  return (g.right.width + GRADIENT_COLUMNS - 1) / GRADIENT_COLUMNS;
}
VOT_INLINE int rectangles(const Gradient& g) {
  return (g.rows + GRADIENT_ROWS - 1) / GRADIENT_ROWS * rectangles_across(g);
}
VOT_INLINE Rectangle rectangle(const Gradient& g, int expert, int number) {
  const int row = number / rectangles_across(g) * GRADIENT_ROWS, column = number % rectangles_across(g) * GRADIENT_COLUMNS;
  return {expert, row, least(GRADIENT_ROWS, g.rows - row), column,
          least(GRADIENT_COLUMNS, g.right.width - column)};
}

// out[rows x columns] = left . right, or added. A vector never goes beyond the end of a row of `out`.
inline void outer_products(Left left, int rows, const float* right, int columns, int depth, Result out, bool add) {
  if (columns % LANES == 0)
    return multiply(rows, columns, left, {right, PANEL}, depth, out, add ? Old::KEEP : Old::CLEAR);
  alignas(64) float sums[STRIP * PANEL];
  multiply(rows, int(round_up(columns, UNIT)), left, {right, PANEL}, depth, {sums, PANEL});
  if (add) copy_rows<true>(sums, PANEL, rows, columns, out.data, out.row);
  else copy_rows(sums, PANEL, rows, columns, out.data, out.row);
}

// Adds a block to a rectangle of its expert's gradient, or begins it.
inline void add_block(const Gradient& g, const ExpertSlots& slots, const Group& group, const Block& block,
                      const Rectangle& at, bool begin) {
  float* right = scratch(size_t(GRADIENT_COLUMNS) * BLOCK);  // [columns / PANEL][places][PANEL]
  for (int i = 0; i < block.count; i++) {
    const float* row = g.right.at(slots, group, block, i) + at.column;
    for (int c = 0; c < at.columns; c += PANEL)
      copy_rows(row + c, 0, 1, least(PANEL, at.columns - c), right + c * BLOCK + i * PANEL, 0);
  }
  const float* left = group.in_panels(g.left, g.rows, block) + at.row * PANEL;
  float* out = g.out + at.expert * g.expert + at.row * g.row + at.column;
  for_strips(at.rows, [&](int r, int rows) {
    for (int c = 0; c < at.columns; c += PANEL)
      for (int p = 0; p < block.panels; p++)
        outer_products({left + p * panel_size(g.rows) + r * PANEL, PANEL, 1}, rows,
                       right + c * BLOCK + p * block.width * PANEL, least(PANEL, at.columns - c), block.filled(p),
                       {out + r * g.row + c, g.row}, !begin || p);
  });
}

inline void rectangle_gradient(const Gradient& g, const ExpertSlots& slots, const Group& group, const Rectangle& at) {
  int64_t first = 0;
  for (int expert = 0; expert < at.expert; expert++) first += blocks_of_expert(slots, expert);
  const int64_t end = least(first + blocks_of_expert(slots, at.expert), group.first_block + group.blocks);
  for (int64_t block = most(first, group.first_block); block < end; block++)
    add_block(g, slots, group, find_block(slots, block), at, block == first);
}

// Adds a group to gradients.
template <int COUNT>
void add_gradients(const Gradient (&gradients)[COUNT], const ExpertSlots& slots, const Group& group,
                   const Parallel& parallel) {
  int each = 0;
  for (const Gradient& g : gradients) each += rectangles(g);
  parallel(int64_t(each) * group.experts, [&](int64_t task) {
    const int expert = group.first_expert + int(task / each);
    if (slots.offsets[expert] == slots.offsets[expert + 1]) return;
    int number = int(task % each);
    const Gradient* g = gradients;
    for (; number >= rectangles(*g); g++) number -= rectangles(*g);
    rectangle_gradient(*g, slots, group, rectangle(*g, expert, number));
  });
}

// Writes 0 where an expert has no place.
inline void clear_unused(const Gradient& g, const ExpertSlots& slots, const Parallel& parallel) {
  parallel(slots.experts, [&](int64_t expert) {
    if (slots.offsets[expert] != slots.offsets[expert + 1]) return;
    for (int r = 0; r < g.rows; r++)
      std::memset(g.out + expert * g.expert + r * g.row, 0, sizeof(float) * g.right.width);
  });
}

}  // namespace VOT_ISA
}  // namespace vot
