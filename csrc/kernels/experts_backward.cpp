// Gradients through the bodies of experts.
#include "experts_blocks.h"

namespace vot {
namespace VOT_ISA {
namespace {

// Strips [rows][PANEL] of an expert's hidden layer, and what belongs to each column.
struct HiddenStrips {
  float *gate, *value, *d_hidden;  // become d_gate, d_value, and weight * hidden
  const float* weights;
  float* d_weights;  // sums over the rows are added
};

void hidden_strip_backward(const HiddenStrips& s, int rows, int count) {
  for (int c = 0; c < count; c += LANES) {
    const Vec weight = load(s.weights + c);
    Vec d_weight = {};
    for (int i = c; i < c + rows * PANEL; i += PANEL) {
      const Vec gate = load(s.gate + i), value = load(s.value + i), d_hidden = load(s.d_hidden + i);
      const Vec slope = sigmoid(gate), silu = gate * slope, hidden = silu * value, d_weighted = d_hidden * weight;
      d_weight += d_hidden * hidden;
      // d silu(x) / dx = s + silu(x) (1 - s), with s = sigmoid(x)
      store(s.gate + i, d_weighted * value * (slope + silu * (1.f - slope)));
      store(s.value + i, d_weighted * silu);
      store(s.d_hidden + i, hidden * weight);
    }
    store(s.d_weights + c, load(s.d_weights + c) + d_weight);
  }
}

void hidden_block_backward(const ExpertsHiddenBackward& b, const Block& block) {
  const bool cached = b.cache.data != nullptr;
  float* d_y = scratch(size_t(panels_size(b.dim) + panels_size(b.rank) + 2 * STRIPS_SIZE + STRIP * PANEL));
  float *cache = d_y + panels_size(b.dim), *d_hidden = cache + panels_size(b.rank), *gate = d_hidden + STRIPS_SIZE;
  float* value = gate + STRIPS_SIZE;
  gather_tokens(block, b.slots, b.d_y, b.dim, d_y);
  if (cached) gather_slots(block, b.slots, b.cache, b.rank, cache);
  const int32_t* slot = b.slots.order + block.first;
  alignas(64) float weights[BLOCK] = {}, d_weights[BLOCK] = {};  // of panels, PANEL apart
  for (int i = 0; i < block.count; i++) weights[i / block.width * PANEL + i % block.width] = b.weights[slot[i]];

  const Left w_gate = of_expert(b.w_gate, block.expert), w_hidden = transposed(of_expert(b.w_out, block.expert));
  for_strips(b.hidden, [&](int r, int rows) {
    product(block, w_hidden.below(r), b.hidden - r, b.dim, d_y, d_hidden);
    if (cached) product(block, w_gate.below(r), b.hidden - r, b.rank, cache, gate);
    for (int p = 0; p < block.panels; p++) {
      const int count = block.filled(p);
      const auto at = [&](auto* matrix) { return block.transposed(matrix, b.hidden, p) + r * block.places; };
      float *own_gate = gate + p * STRIP * PANEL, *own_d_hidden = d_hidden + p * STRIP * PANEL;
      if (!cached) read_strip(at(b.gate), block.places, rows, count, own_gate);
      read_strip(at(b.value), block.places, rows, count, value);
      hidden_strip_backward({own_gate, value, own_d_hidden, weights + p * PANEL, d_weights + p * PANEL}, rows, count);
      write_strip(own_gate, rows, count, at(b.d_gate), block.places);
      write_strip(value, rows, count, at(b.d_value), block.places);
      write_strip(own_d_hidden, rows, count, at(b.weighted), block.places);
    }
  });
  for (int i = 0; i < block.count; i++) b.d_weights[slot[i]] = d_weights[i / block.width * PANEL + i % block.width];
}

// The panels of a transposed matrix [rows].
void read_panels(const Block& block, const float* matrix, int rows, float* panels) {
  for (int p = 0; p < block.panels; p++)
    read_strip(block.transposed(matrix, rows, p), block.places, rows, block.filled(p), panels + p * panel_size(rows));
}

// d_cache = w_gate^T . d_gate + scale * cache: panels, and a copy that stays.
void cache_backward(const ExpertsInputBackward& b, const Block& block, const float* d_gate, float* strips,
                    float* d_cache) {
  gather_slots(block, b.slots, b.cache, b.rank, d_cache);
  const Left w_gate = transposed(of_expert(b.w_gate, block.expert));
  const int32_t* slot = b.slots.order + block.first;
  for_strips(b.rank, [&](int r, int rows) {
    product(block, w_gate.below(r), b.rank - r, b.hidden, d_gate, strips);
    for (int p = 0; p < block.panels; p++) {
      const int count = block.filled(p);
      alignas(64) float scales[PANEL] = {};
      if (b.scale)
        for (int i = 0; i < count; i++) scales[i] = b.scale[slot[p * block.width + i]];
      float *to = d_cache + p * panel_size(b.rank) + r * PANEL, *strip = strips + p * STRIP * PANEL;
      for (int i = 0; i < rows * PANEL; i += PANEL)
        for (int c = 0; c < count; c += LANES)
          store(to + i + c, load(to + i + c) * load(scales + c) + load(strip + i + c));
      write_strip(to, rows, count, block.transposed(b.d_cache, b.rank, p) + r * block.places, block.places);
    }
  });
}

void input_block_backward(const ExpertsInputBackward& b, const Block& block) {
  const bool cached = b.cache.data != nullptr;
  float* d_gate = scratch(size_t(2 * panels_size(b.hidden) + panels_size(b.rank) + STRIPS_SIZE));
  float *d_value = d_gate + panels_size(b.hidden), *d_cache = d_value + panels_size(b.hidden);
  float* strips = d_cache + panels_size(b.rank);
  read_panels(block, b.d_gate, b.hidden, d_gate);
  read_panels(block, b.d_value, b.hidden, d_value);
  if (cached) cache_backward(b, block, d_gate, strips, d_cache);

  const Left w_value = transposed(of_expert(b.w_value, block.expert));
  const Left w_first = transposed(of_expert(cached ? b.w_down : b.w_gate, block.expert));
  const int depth = cached ? b.rank : b.hidden;
  for_strips(b.dim, [&](int r, int rows) {
    product(block, w_first.below(r), b.dim - r, depth, cached ? d_cache : d_gate, strips);
    product(block, w_value.below(r), b.dim - r, b.hidden, d_value, strips, Old::KEEP);
    scatter_slots(block, b.slots, strips, r, rows, b.dim, b.d_x);
  });
}

// A rectangle of an expert's weight gradient.
constexpr int GRADIENT_ROWS = 4 * STRIP * 2, GRADIENT_PANELS = 4;
struct Rectangle {
  int expert, row, rows, column, columns;
};

// panels[p][places][PANEL] = the rectangle's columns of `count` rows, from place `first` on; filled up with zeros.
void copy_columns(const ExpertsWeightGradient& g, const Rectangle& part, int64_t first, int count, float* panels) {
  for (int i = 0; i < count; i++) {
    const int64_t slot = g.slots.order[first + i];
    const float* from = g.right.data + (g.right_by_slot ? slot : slot / g.slots.top_k) * g.right.row + part.column;
    for (int c = 0; c < part.columns; c += 16) {
      float* to = panels + (c / PANEL * DEPTH + i) * PANEL + c % PANEL;
      if (part.columns - c < 16) std::memset(to, 0, 16 * sizeof(float));
      copy_16(from + c, to, part.columns - c);
    }
  }
}

// Writes sums[p][rows][PANEL].
void write_rectangle(const ExpertsWeightGradient& g, const Rectangle& part, const float* sums) {
  float* out = g.out + part.expert * g.out_expert + part.row * g.out_row + part.column * g.out_column;
  for (int c = 0; c < part.columns; c += PANEL) {
    const int columns = least(PANEL, part.columns - c);
    const float* panel = sums + c * GRADIENT_ROWS;
    float* to = out + c * g.out_column;
    if (g.out_column == 1) write_strip(panel, part.rows, columns, to, g.out_row);
    else scatter_strip(panel, part.rows, columns, [&](int i) { return to + i * g.out_column; });
  }
}

void rectangle_gradient(const ExpertsWeightGradient& g, const Rectangle& part) {
  const int64_t start = g.slots.offsets[part.expert], places = g.slots.offsets[part.expert + 1] - start;
  const float* left = g.left + start * g.rows + part.row * places;
  float* sums = scratch(size_t(GRADIENT_PANELS) * PANEL * (GRADIENT_ROWS + DEPTH));
  float* right = sums + GRADIENT_PANELS * PANEL * GRADIENT_ROWS;
  const int panels = (part.columns + PANEL - 1) / PANEL;
  const auto width = [&](int p) { return int(round_up(least(PANEL, part.columns - p * PANEL), UNIT)); };
  if (!places) std::memset(sums, 0, sizeof(float) * GRADIENT_PANELS * PANEL * GRADIENT_ROWS);
  for (int64_t k = 0; k < places; k += DEPTH) {
    const int depth = int(least<int64_t>(DEPTH, places - k));
    copy_columns(g, part, start + k, depth, right);
    for_strips(part.rows, [&](int r, int rows) {
      const int after = least(STRIP, most(0, part.rows - r - STRIP));
      const Left a = {left + r * places + k, places, 1};
      multiply_panels(panels, width, rows, a, depth, {right, DEPTH * PANEL},
                      {sums + r * PANEL, GRADIENT_ROWS * PANEL}, k ? Old::KEEP : Old::CLEAR,
                      Ahead(a.below(STRIP), after, depth, panels * tiles(rows, PANEL)));
    });
  }
  write_rectangle(g, part, sums);
}

}  // namespace

void experts_hidden_backward(const ExpertsHiddenBackward& b, const Parallel& parallel) {
  parallel(count_blocks(b.slots), [&](int64_t task) { hidden_block_backward(b, find_block(b.slots, task)); });
}

void experts_input_backward(const ExpertsInputBackward& b, const Parallel& parallel) {
  parallel(count_blocks(b.slots), [&](int64_t task) { input_block_backward(b, find_block(b.slots, task)); });
}

void experts_weight_gradient(const ExpertsWeightGradient& g, const Parallel& parallel) {
  constexpr int COLUMNS = GRADIENT_PANELS * PANEL;
  const int64_t down = (g.rows + GRADIENT_ROWS - 1) / GRADIENT_ROWS, across = (g.columns + COLUMNS - 1) / COLUMNS;
  parallel(g.slots.experts * down * across, [&](int64_t task) {
    const int row = int(task / across % down) * GRADIENT_ROWS, column = int(task % across) * COLUMNS;
    rectangle_gradient(g, {int(task / across / down), row, least(GRADIENT_ROWS, g.rows - row), column,
                           least(COLUMNS, g.columns - column)});
  });
}

}  // namespace VOT_ISA
}  // namespace vot
