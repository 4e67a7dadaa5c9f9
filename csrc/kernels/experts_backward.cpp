// Gradients through the bodies of experts.
#include "experts_gradients.h"

namespace vot {
namespace VOT_ISA {
namespace {

// What the gradients of the weights need of a block, in panels. Where the numbers of d_w_out lie side by side along
// hidden, `weighted` is its right operand, a row of hidden numbers for each place, and d_y its left one.
struct Kept {
  float *d_gate, *d_value, *weighted;  // [hidden]
  float* d_y;                          // [dim], null where `weighted` lies in panels
};

// What a block has of what its group keeps.
Kept of_block(const Kept& kept, const ExpertsBackward& b, const Group& group, const Block& block) {
  const auto hidden = [&](float* data) { return group.in_panels(data, b.hidden, block); };
  if (!kept.d_y) return {hidden(kept.d_gate), hidden(kept.d_value), hidden(kept.weighted), nullptr};
  float* rows = kept.weighted + group.columns_before(block.first, block.number) * b.hidden;
  return {hidden(kept.d_gate), hidden(kept.d_value), rows, group.in_panels(kept.d_y, b.dim, block)};
}

// Strips [rows] of an expert's hidden layer, and what belongs to each column. Rows are PANEL apart, if not `row`.
struct HiddenStrips {
  const float *gate, *value;
  int64_t gate_row, value_row;
  const float* d_hidden;
  float *d_gate, *d_value;
  float* weighted;  // weight * hidden
  const float* weights;
  float* d_weights;  // sums over the rows are added
};

void hidden_strip_backward(const HiddenStrips& s, int rows, int count) {
  const auto column = [&](int c, auto read) {
    const Vec weight = load(s.weights + c);
    Vec d_weight = {};
    for (int r = 0; r < rows; r++) {
      const int i = r * PANEL + c;
      const Vec gate = read(s.gate + r * s.gate_row + c), value = read(s.value + r * s.value_row + c);
      const Vec d_hidden = load(s.d_hidden + i), d_weighted = d_hidden * weight;
      const Vec slope = sigmoid(gate), silu = gate * slope, hidden = silu * value;
      d_weight += d_hidden * hidden;
      // d silu(x) / dx = s + silu(x) (1 - s), with s = sigmoid(x)
      store(s.d_gate + i, d_weighted * value * (slope + silu * (1.f - slope)));
      store(s.d_value + i, d_weighted * silu);
      store(s.weighted + i, hidden * weight);
    }
    store(s.d_weights + c, load(s.d_weights + c) + d_weight);
  };
  int c = 0;
  for (; c + LANES <= count; c += LANES) column(c, [](const float* from) { return load(from); });
  if (c < count) column(c, [&](const float* from) { return load_part(from, count - c); });
}

// Fills `kept` and writes the gradients of the weights of slots.
void hidden_backward(const ExpertsBackward& b, const Block& block, const Kept& kept) {
  const bool cached = b.rank > 0;
  float* cache = scratch(size_t(panels_size(b.rank) + 2 * STRIPS_SIZE + STRIP * PANEL + panels_size(b.dim)));
  float *d_hidden = cache + panels_size(b.rank), *gates = d_hidden + STRIPS_SIZE, *turned = gates + STRIPS_SIZE;
  float* d_y = kept.d_y ? kept.d_y : turned + STRIP * PANEL;
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
      const auto saved = [&](const float* matrix) { return block.in_panel(matrix, b.hidden, p) + r * count; };
      const float* gate = cached ? gates + p * STRIP * PANEL : saved(b.gate);
      const int64_t row = p * panel_size(b.hidden) + r * PANEL;
      float* weighted = kept.d_y ? turned : kept.weighted + row;
      hidden_strip_backward({gate, saved(b.value), cached ? PANEL : count, count, d_hidden + p * STRIP * PANEL,
                             kept.d_gate + row, kept.d_value + row, weighted, weights + p * PANEL,
                             d_weights + p * PANEL}, rows, count);
      float* first = kept.weighted + int64_t(p) * block.width * b.hidden + r;
      if (kept.d_y) scatter_panel(turned, rows, count, [&](int i) { return first + int64_t(i) * b.hidden; });
    }
  });
  for (int i = 0; i < block.count; i++) b.d_weights[slot[i]] = d_weights[i / block.width * PANEL + i % block.width];
}

void body_backward(const ExpertsBackward& b, const Block& block, const Kept& kept) {
  hidden_backward(b, block, kept);
  float* sums = scratch(size_t(panels_size(b.dim) + panels_size(b.rank)));
  const Left w_gate = transposed(of_expert(b.w_gate, block.expert));
  whole_product(block, transposed(of_expert(b.w_value, block.expert)), b.dim, b.hidden, kept.d_value, sums);
  const bool cached = b.rank > 0;
  if (!cached) whole_product(block, w_gate, b.dim, b.hidden, kept.d_gate, sums, Old::KEEP);
  scatter_slots(block, b.slots, sums, b.dim, b.d_x);
  if (!cached) return;
  whole_product(block, w_gate, b.rank, b.hidden, kept.d_gate, sums);
  scatter_slots(block, b.slots, sums, b.rank, b.d_cache);
}

// That of w_out where its numbers lie side by side along hidden.
Gradient gradient_along_hidden(const ExpertsBackward& b) {
  const PlaceRows weighted = {{nullptr, b.hidden}, b.hidden, PlaceRows::COLUMN};
  return {nullptr, b.dim, weighted, b.d_w_out.data, b.d_w_out.expert, b.d_w_out.column};
}

// Fills the panels d_cache [rank], and adds to d_x.
void cache_backward(const ExpertsCacheBackward& b, const Block& block, float* d_cache) {
  float* sums = scratch(size_t(panels_size(b.dim)));
  gather_slots(block, b.slots, b.d_cache, b.rank, d_cache);
  whole_product(block, transposed(of_expert(b.w_down, block.expert)), b.dim, b.rank, d_cache, sums);
  scatter_slots</*ADD=*/true>(block, b.slots, sums, b.dim, b.d_x);
}

}  // namespace

void experts_backward(const ExpertsBackward& b, const Parallel& parallel) {
  const PlaceRows x = {b.x, b.dim, PlaceRows::TOKEN}, d_y = {b.d_y, b.dim, PlaceRows::TOKEN};
  const PlaceRows gate_input = b.rank > 0 ? PlaceRows{b.cache, b.rank, PlaceRows::SLOT} : x;
  const bool along_hidden = b.d_w_out.column != 1;
  Gradient gradients[] = {gradient(b.hidden, gate_input, b.d_w_gate), gradient(b.hidden, x, b.d_w_value),
                          along_hidden ? gradient_along_hidden(b) : gradient(b.hidden, d_y, b.d_w_out)};
  for (const Gradient& g : gradients) clear_unused(g, b.slots, parallel);
  for_groups(b.slots, [&](const Group& group) {
    const int64_t size = group.columns() * Group::padded(b.hidden);
    float* memory = scratch<1>(size_t(3 * size + (along_hidden ? group.columns() * Group::padded(b.dim) : 0)));
    const Kept kept = {memory, memory + size, memory + 2 * size, along_hidden ? memory + 3 * size : nullptr};
    parallel(group.blocks, [&](int64_t task) {
      const Block block = find_block(b.slots, group.first_block + task);
      body_backward(b, block, of_block(kept, b, group, block));
    });
    gradients[0].left = kept.d_gate;
    gradients[1].left = kept.d_value;
    gradients[2].left = along_hidden ? kept.d_y : kept.weighted;
    if (along_hidden) gradients[2].right.rows.data = kept.weighted;
    add_gradients(gradients, b.slots, group, parallel);
  });
}

void experts_cache_backward(const ExpertsCacheBackward& b, const Parallel& parallel) {
  Gradient gradients[] = {gradient(b.rank, {b.x, b.dim, PlaceRows::TOKEN}, b.d_w_down)};
  clear_unused(gradients[0], b.slots, parallel);
  for_groups(b.slots, [&](const Group& group) {
    float* d_cache = scratch<1>(size_t(group.columns() * Group::padded(b.rank)));
    parallel(group.blocks, [&](int64_t task) {
      const Block block = find_block(b.slots, group.first_block + task);
      cache_backward(b, block, group.in_panels(d_cache, b.rank, block));
    });
    gradients[0].left = d_cache;
    add_gradients(gradients, b.slots, group, parallel);
  });
}

}  // namespace VOT_ISA
}  // namespace vot
