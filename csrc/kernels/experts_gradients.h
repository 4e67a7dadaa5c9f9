// Gradients of the experts' weights, and the groups of places that the backwards go through.
//
// What a group's blocks leave for the gradients of the weights lies in memory of the calling thread, which is bounded.
// An expert with more places has its gradient summed over several groups.
#pragma once
#include "experts_blocks.h"

namespace vot {
namespace VOT_ISA {

constexpr int64_t GROUP = 4096;  // places of a group, about

// Successive blocks, and what they cover: some places of some experts.
struct Group {
  int64_t first_block, blocks;
  int64_t first, places;
  int first_expert, experts;
};

// The places of an expert that a group has.
struct Part {
  int64_t first, places;  // `first` counts the group's
  bool later;             // there are earlier ones
};
VOT_INLINE Part part_of(const ExpertSlots& slots, const Group& group, int expert) {
  const int64_t start = slots.offsets[expert], end = slots.offsets[expert + 1];
  const int64_t first = most(start, group.first);
  return {first - group.first, most<int64_t>(0, least(end, group.first + group.places) - first), first > start};
}

// The block's place in a matrix that is transposed for the group alone.
VOT_INLINE Block in_group(const ExpertSlots& slots, const Group& group, Block block) {
  const Part part = part_of(slots, group, block.expert);
  block.first -= group.first;
  block.begin = block.first - part.first;
  block.places = part.places;
  return block;
}

// body(group) for all blocks, in groups that do not depend on the number of threads.
template <class Body>
void for_groups(const ExpertSlots& slots, const Body& body) {
  const int64_t blocks = count_blocks(slots);
  for (int64_t first = 0, next; first < blocks; first = next) {
    const Block begin = find_block(slots, first);
    Block last = begin;
    for (next = first + 1; next < blocks; next++) {
      const Block block = find_block(slots, next);
      if (block.first + block.count - begin.first > GROUP) break;
      last = block;
    }
    body(Group{first, next - first, begin.first, last.first + last.count - begin.first, begin.expert,
               last.expert + 1 - begin.expert});
  }
}

// out[r, c] of each expert = sum over its places of left[r] * right[c].
struct Gradient {
  const float* left;  // transposed for the group, [rows]
  ExpertRows right;   // [tokens][columns], or [slots][columns]
  bool by_slot;
  int rows, columns;
  ExpertGradients out;
};

// A rectangle of an expert's gradient is a task.
constexpr int GRADIENT_ROWS = 8 * STRIP, GRADIENT_PANELS = 4, GRADIENT_COLUMNS = GRADIENT_PANELS * PANEL;
struct Rectangle {
  int expert, row, rows, column, columns;
};
VOT_INLINE int rectangles_across(const Gradient& g) { return (g.columns + GRADIENT_COLUMNS - 1) / GRADIENT_COLUMNS; }
VOT_INLINE int rectangles(const Gradient& g) {
  return (g.rows + GRADIENT_ROWS - 1) / GRADIENT_ROWS * rectangles_across(g);
}
VOT_INLINE Rectangle rectangle(const Gradient& g, int expert, int number) {
  const int row = number / rectangles_across(g) * GRADIENT_ROWS, column = number % rectangles_across(g) * GRADIENT_COLUMNS;
  return {expert, row, least(GRADIENT_ROWS, g.rows - row), column, least(GRADIENT_COLUMNS, g.columns - column)};
}

// panels[p][count][PANEL] = the rectangle's columns of the rows of some places; filled up with zeros.
inline void copy_columns(const Gradient& g, const Rectangle& at, const int32_t* slots, int top_k, int count,
                         float* panels) {
  for (int i = 0; i < count; i++) {
    const float* from = g.right.data + int64_t(g.by_slot ? slots[i] : slots[i] / top_k) * g.right.row + at.column;
    for (int c = 0; c < at.columns; c += 16) {
      float* to = panels + (c / PANEL * DEPTH + i) * PANEL + c % PANEL;
      if (at.columns - c < 16) std::memset(to, 0, 16 * sizeof(float));
      copy_16(from + c, to, at.columns - c);
    }
  }
}

// Writes sums[p][GRADIENT_ROWS][PANEL], or adds them.
inline void write_rectangle(const Gradient& g, const Rectangle& at, const float* sums, bool add) {
  float* out = g.out.data + at.expert * g.out.expert + at.row * g.out.row + at.column * g.out.column;
  for (int c = 0; c < at.columns; c += PANEL) {
    const int columns = least(PANEL, at.columns - c);
    const float* panel = sums + c * GRADIENT_ROWS;
    float* to = out + c * g.out.column;
    if (g.out.column == 1) write_strip(panel, at.rows, columns, to, g.out.row, add);
    else scatter_panel(panel, at.rows, columns, add, [&](int i) { return to + i * g.out.column; });
  }
}

inline void rectangle_gradient(const Gradient& g, const ExpertSlots& slots, const Group& group, const Rectangle& at) {
  const Part part = part_of(slots, group, at.expert);
  const float* left = g.left + part.first * g.rows + at.row * part.places;
  const int32_t* order = slots.order + group.first + part.first;
  float* sums = scratch(size_t(GRADIENT_COLUMNS) * (GRADIENT_ROWS + DEPTH));
  float* right = sums + GRADIENT_COLUMNS * GRADIENT_ROWS;
  for (int64_t k = 0; k < part.places; k += DEPTH) {
    const int depth = int(least<int64_t>(DEPTH, part.places - k));
    copy_columns(g, at, order + k, slots.top_k, depth, right);
    for_strips(at.rows, [&](int r, int rows) {
      for (int c = 0; c < at.columns; c += PANEL)
        multiply(rows, int(round_up(least(PANEL, at.columns - c), UNIT)), {left + r * part.places + k, part.places, 1},
                 {right + c * DEPTH, PANEL}, depth, {sums + c * GRADIENT_ROWS + r * PANEL, PANEL},
                 k ? Old::KEEP : Old::CLEAR);
    });
  }
  write_rectangle(g, at, sums, part.later);
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
inline void clear_unused(ExpertGradients out, int rows, int columns, const ExpertSlots& slots, const Parallel& parallel) {
  if (out.column != 1) {
    const int64_t row = out.row;
    out.row = out.column, out.column = row;
    const int swapped = rows;
    rows = columns, columns = swapped;
  }
  parallel(slots.experts, [&](int64_t expert) {
    if (slots.offsets[expert] != slots.offsets[expert + 1]) return;
    for (int r = 0; r < rows; r++) std::memset(out.data + expert * out.expert + r * out.row, 0, sizeof(float) * columns);
  });
}

}  // namespace VOT_ISA
}  // namespace vot
