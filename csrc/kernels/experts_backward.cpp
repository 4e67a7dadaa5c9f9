// Gradients through the bodies of experts.
#include "experts_gradients.h"

namespace vot {
namespace VOT_ISA {
namespace {

// What the gradients of the weights need, a row [hidden] for each place of a group.
struct HiddenGradients {
  float *d_gate, *d_value, *weighted;
};

// Strips [rows][PANEL] of an expert's hidden layer, and what belongs to each column.
struct HiddenStrips {
  const float *gate, *value;
  float* d_hidden;  // becomes weight * hidden
  float *d_gate, *d_value;
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
      store(s.d_gate + i, d_weighted * value * (slope + silu * (1.f - slope)));
      store(s.d_value + i, d_weighted * silu);
      store(s.d_hidden + i, hidden * weight);
    }
    store(s.d_weights + c, load(s.d_weights + c) + d_weight);
  }
}

// Fills the panels d_gate and d_value [hidden], and the block's rows of `kept`.
void hidden_backward(const ExpertsBackward& b, const Block& block, const HiddenGradients& kept, float* d_gate,
                     float* d_value) {
  const bool cached = b.rank > 0;
  float* d_y = scratch<2>(size_t(panels_size(b.dim) + panels_size(b.rank) + 2 * STRIPS_SIZE + STRIP * PANEL));
  float *cache = d_y + panels_size(b.dim), *d_hidden = cache + panels_size(b.rank), *gates = d_hidden + STRIPS_SIZE;
  float* value = gates + STRIPS_SIZE;
  gather_tokens(block, b.slots, b.d_y, b.dim, d_y);
  if (cached) gather_slots(block, b.slots, b.cache, b.rank, cache);
  const int32_t* slot = b.slots.order + block.first;
  alignas(64) float weights[BLOCK] = {}, d_weights[BLOCK] = {};  // of panels, PANEL apart
  for (int i = 0; i < block.count; i++) weights[i / block.width * PANEL + i % block.width] = b.weights[slot[i]];

  const Left w_gate = of_expert(b.w_gate, block.expert), w_hidden = transposed(of_expert(b.w_out, block.expert));
  for_strips(b.hidden, [&](int r, int rows) {
    product(block, w_hidden.below(r), rows, b.dim, d_y, d_hidden);
    if (cached) product(block, w_gate.below(r), rows, b.rank, cache, gates);
    for (int p = 0; p < block.panels; p++) {
      const int count = block.filled(p);
      const auto saved = [&](const float* matrix, float* strip) {
        copy_rows(block.in_panel(matrix, b.hidden, p) + r * count, count, rows, count, strip, PANEL);
      };
      const auto keep = [&](const float* strip, float* matrix) {
        float* row = matrix + int64_t(p) * block.width * b.hidden + r;
        scatter_panel(strip, rows, count, [&](int i) { return row + int64_t(i) * b.hidden; });
      };
      float *gate = gates + p * STRIP * PANEL, *weighted = d_hidden + p * STRIP * PANEL;
      const int64_t row = p * panel_size(b.hidden) + r * PANEL;
      if (!cached) saved(b.gate, gate);
      saved(b.value, value);
      hidden_strip_backward({gate, value, weighted, d_gate + row, d_value + row, weights + p * PANEL,
                             d_weights + p * PANEL}, rows, count);
      keep(d_gate + row, kept.d_gate);
      keep(d_value + row, kept.d_value);
      keep(weighted, kept.weighted);
    }
  });
  for (int i = 0; i < block.count; i++) b.d_weights[slot[i]] = d_weights[i / block.width * PANEL + i % block.width];
}

void body_backward(const ExpertsBackward& b, const Block& block, const HiddenGradients& kept) {
  const bool cached = b.rank > 0;
  float* d_gate = scratch(size_t(2 * panels_size(b.hidden)));
  float* d_value = d_gate + panels_size(b.hidden);
  hidden_backward(b, block, kept, d_gate, d_value);

  float* sums = scratch<2>(size_t(panels_size(b.dim) + panels_size(b.rank)));
  const Left w_gate = transposed(of_expert(b.w_gate, block.expert));
  whole_product(block, transposed(of_expert(b.w_value, block.expert)), b.dim, b.hidden, d_value, sums);
  if (!cached) whole_product(block, w_gate, b.dim, b.hidden, d_gate, sums, Old::KEEP);
  scatter_slots(block, b.slots, sums, b.dim, b.d_x);
  if (!cached) return;
  whole_product(block, w_gate, b.rank, b.hidden, d_gate, sums);
  scatter_slots(block, b.slots, sums, b.rank, b.d_cache);
}

// Adds to d_x.
void cache_backward(const ExpertsCacheBackward& b, const Block& block) {
  float* d_cache = scratch(size_t(panels_size(b.rank) + panels_size(b.dim)));
  float* sums = d_cache + panels_size(b.rank);
  gather_slots(block, b.slots, b.d_cache, b.rank, d_cache);
  whole_product(block, transposed(of_expert(b.w_down, block.expert)), b.dim, b.rank, d_cache, sums);
  scatter_slots</*ADD=*/true>(block, b.slots, sums, b.dim, b.d_x);
}

}  // namespace

void experts_backward(const ExpertsBackward& b, const Parallel& parallel) {
  const bool cached = b.rank > 0;
  const PlaceRows x = {b.x, b.dim, PlaceRows::TOKEN}, d_y = {b.d_y, b.dim, PlaceRows::TOKEN};
  const PlaceRows gate_input = cached ? PlaceRows{b.cache, b.rank, PlaceRows::SLOT} : x;
  clear_unused(b.d_w_gate, b.hidden, gate_input.width, b.slots, parallel);
  clear_unused(b.d_w_value, b.hidden, b.dim, b.slots, parallel);
  clear_unused(b.d_w_out, b.hidden, b.dim, b.slots, parallel);
  for_groups(b.slots, [&](const Group& group) {
    const int64_t size = group.places * b.hidden;
    float* memory = scratch<1>(size_t(3 * size));
    const auto kept = [&](int64_t i) { return memory + i * size; };
    parallel(group.blocks, [&](int64_t task) {
      const Block block = find_block(b.slots, group.first_block + task);
      const int64_t at = (block.first - group.first) * b.hidden;
      body_backward(b, block, {kept(0) + at, kept(1) + at, kept(2) + at});
    });
    const auto rows = [&](int64_t i) { return PlaceRows{{kept(i), b.hidden}, b.hidden, PlaceRows::PLACE}; };
    const Gradient gradients[] = {gradient(rows(0), gate_input, b.d_w_gate), gradient(rows(1), x, b.d_w_value),
                                  gradient(rows(2), d_y, b.d_w_out)};
    add_gradients(gradients, b.slots, group, parallel);
  });
}

void experts_cache_backward(const ExpertsCacheBackward& b, const Parallel& parallel) {
  clear_unused(b.d_w_down, b.rank, b.dim, b.slots, parallel);
  const Gradient gradients[] = {
      gradient({b.d_cache, b.rank, PlaceRows::SLOT}, {b.x, b.dim, PlaceRows::TOKEN}, b.d_w_down)};
  for_groups(b.slots, [&](const Group& group) {
    parallel(group.blocks, [&](int64_t task) { cache_backward(b, find_block(b.slots, group.first_block + task)); });
    add_gradients(gradients, b.slots, group, parallel);
  });
}

}  // namespace VOT_ISA
}  // namespace vot
