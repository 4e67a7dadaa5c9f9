// The bodies of experts, and the sum over the experts of a token.
#include "experts_blocks.h"

namespace vot {
namespace VOT_ISA {
namespace {

// hidden = SiLU(gate) * value of a strip; overwrites nothing but `hidden`.
void activate(const float* gate, const float* value, int rows, int count, float* hidden) {
  for (int r = 0; r < rows; r++)
    for (int c = r * PANEL; c < r * PANEL + int(round_up(count, UNIT)); c += LANES) {
      const Vec x = load(gate + c);
      store(hidden + c, x * sigmoid(x) * load(value + c));
    }
}

void forward_block(const ExpertsForward& f, const Block& block) {
  const bool cached = f.rank > 0;
  const int gate_depth = cached ? f.rank : f.dim;
  float* x = scratch(size_t(panels_size(f.dim) + panels_size(f.hidden) + panels_size(f.rank) + 2 * STRIPS_SIZE));
  float *hidden = x + panels_size(f.dim), *cache = hidden + panels_size(f.hidden);
  float *gate = cache + panels_size(f.rank), *value = gate + STRIPS_SIZE;
  gather_tokens(block, f.slots, f.x, f.dim, x);
  if (cached) gather_slots(block, f.slots, f.cache, f.rank, cache);

  const Left w_gate = of_expert(f.w_gate, block.expert), w_value = of_expert(f.w_value, block.expert);
  for_strips(f.hidden, [&](int r, int rows) {
    product(block, w_gate.below(r), rows, gate_depth, cached ? cache : x, gate);
    product(block, w_value.below(r), rows, f.dim, x, value);
    for (int p = 0; p < block.panels; p++) {
      const int count = block.filled(p), strip = p * STRIP * PANEL;
      activate(gate + strip, value + strip, rows, count, hidden + p * panel_size(f.hidden) + r * PANEL);
      const auto keep = [&](const float* from, float* to) {
        if (to) copy_rows(from + strip, PANEL, rows, count, block.in_panel(to, f.hidden, p) + r * count, count);
      };
      keep(gate, f.gate);
      keep(value, f.value);
    }
  });

  float* out = x;  // x is done with
  whole_product(block, of_expert(f.w_out, block.expert), f.dim, f.hidden, hidden, out);
  scatter_slots(block, f.slots, out, f.dim, f.out);
}

void combine_token(const ExpertsCombine& c, int64_t token) {
  const int64_t slot = token * c.top_k;
  float* out = c.out + token * c.dim;
  for (int d = 0; d < c.dim; d += 16) {
    alignas(64) float sums[16] = {}, row[16] = {};
    const int count = least(16, c.dim - d);
    for (int j = 0; j < c.top_k; j++) {
      if (c.places[slot + j] < 0) continue;
      const Vec weight = splat(c.weights ? c.weights[slot + j] : 1.f);
      copy_16(c.rows + (slot + j) * c.dim + d, row, count);
      for (int i = 0; i < 16; i += LANES) store(sums + i, load(sums + i) + weight * load(row + i));
    }
    copy_16(sums, out + d, count);
  }
}

}  // namespace

void experts_forward(const ExpertsForward& f, const Parallel& parallel) {
  parallel(count_blocks(f.slots), [&](int64_t task) { forward_block(f, find_block(f.slots, task)); });
}

void experts_combine(const ExpertsCombine& c, const Parallel& parallel) {
  constexpr int64_t TOKENS = 64;
  parallel((c.tokens + TOKENS - 1) / TOKENS, [&](int64_t task) {
    for (int64_t t = task * TOKENS; t < least(c.tokens, (task + 1) * TOKENS); t++) combine_token(c, t);
  });
}

}  // namespace VOT_ISA
}  // namespace vot
