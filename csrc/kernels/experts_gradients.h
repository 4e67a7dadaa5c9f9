// Gradients of the experts' weights, and the groups of places that the backwards go through.
//
// What a group's blocks leave for the gradients of the weights lies in memory of the calling thread, which is bounded.
// Gradients are summed in the tensors themselves, whose memory is touched as often as DEPTH places demand.
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

// A row for each place of a group, found by its number among these places, by its slot or by its token.
struct PlaceRows {
  ExpertRows rows;
  int width;
  enum { PLACE, SLOT, TOKEN } by;

  const float* at(const ExpertSlots& slots, const Group& group, int64_t place) const {
    if (by == PLACE) return rows.data + place * rows.row;
    const int64_t slot = slots.order[group.first + place];
    return rows.data + (by == SLOT ? slot : slot / slots.top_k) * rows.row;
  }
};

// out[r, c] of each expert = sum over its places of left[r] * right[c]. The numbers of a row of `out` lie side by side.
struct Gradient {
  PlaceRows left, right;
  float* out;
  int64_t expert, row;
};
VOT_INLINE Gradient gradient(PlaceRows left, PlaceRows right, ExpertGradients out) {
  if (out.column == 1) return {left, right, out.data, out.expert, out.row};
  return {right, left, out.data, out.expert, out.column};
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
  return (g.left.width + GRADIENT_ROWS - 1) / GRADIENT_ROWS * rectangles_across(g);
}
VOT_INLINE Rectangle rectangle(const Gradient& g, int expert, int number) {
  const int row = number / rectangles_across(g) * GRADIENT_ROWS, column = number % rectangles_across(g) * GRADIENT_COLUMNS;
  return {expert, row, least(GRADIENT_ROWS, g.left.width - row), column,
          least(GRADIENT_COLUMNS, g.right.width - column)};
}

// out[rows x columns] = left^T . right, or added. A vector never goes beyond the end of a row of `out`.
inline void outer_products(const float* left, int rows, const float* right, int columns, int depth, Result out,
                           bool add) {
  if (columns % LANES == 0)
    return multiply(rows, columns, {left, 1, STRIP}, {right, PANEL}, depth, out, add ? Old::KEEP : Old::CLEAR);
  alignas(64) float sums[STRIP * PANEL];
  multiply(rows, int(round_up(columns, UNIT)), {left, 1, STRIP}, {right, PANEL}, depth, {sums, PANEL});
  if (add) copy_rows<true>(sums, PANEL, rows, columns, out.data, out.row);
  else copy_rows(sums, PANEL, rows, columns, out.data, out.row);
}

inline void rectangle_gradient(const Gradient& g, const ExpertSlots& slots, const Group& group, const Rectangle& at) {
  const Part part = part_of(slots, group, at.expert);
  float* right = scratch(size_t(GRADIENT_COLUMNS) * DEPTH);
  alignas(64) float left[DEPTH * STRIP];
  const float *left_rows[DEPTH], *right_rows[DEPTH];
  for (int64_t k = 0; k < part.places; k += DEPTH) {
    const int depth = int(least<int64_t>(DEPTH, part.places - k));
    for (int i = 0; i < depth; i++) {
      left_rows[i] = g.left.at(slots, group, part.first + k + i) + at.row;
      right_rows[i] = g.right.at(slots, group, part.first + k + i) + at.column;
    }
    // to[depth][width] = some columns of the rows.
    const auto bring = [&](const float* const* rows, int column, int columns, float* to, int width) {
      for (int i = 0; i < depth; i++) copy_rows(rows[i] + column, 0, 1, columns, to + i * width, 0);
    };
    for (int c = 0; c < at.columns; c += PANEL)
      bring(right_rows, c, least(PANEL, at.columns - c), right + c * DEPTH, PANEL);
    for_strips(at.rows, [&](int r, int rows) {
      bring(left_rows, r, rows, left, STRIP);
      float* out = g.out + at.expert * g.expert + (at.row + r) * g.row + at.column;
      for (int c = 0; c < at.columns; c += PANEL)
        outer_products(left, rows, right + c * DEPTH, least(PANEL, at.columns - c), depth, {out + c, g.row},
                       k || part.later);
    });
  }
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
