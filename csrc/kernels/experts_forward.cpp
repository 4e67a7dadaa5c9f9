// The bodies of experts, and the sum over the experts of a token.
#include "experts_few.h"

namespace vot {
namespace VOT_ISA {
namespace {

// The first `count` columns of a row of `to`, where there is one, become those of a vector at column c.
VOT_INLINE void keep(float* to, int row, int c, int count, Vec x) {
  if (!to || c >= count) return;
  to += row * count + c;
  if (count - c >= LANES) store(to, x);
  else store_part(to, x, count - c);
}

// hidden = SiLU(gate) * value of a strip; both are kept in rows of `count` numbers where somebody reads them.
void activate(const float* gate, const float* value, int rows, int count, float* hidden, float* kept_gate,
              float* kept_value) {
  for (int r = 0; r < rows; r++)
    for (int c = 0; c < int(round_up(count, UNIT)); c += LANES) {
      const Vec x = load(gate + r * PANEL + c), y = load(value + r * PANEL + c);
      store(hidden + r * PANEL + c, x * sigmoid(x) * y);
      keep(kept_gate, r, c, count, x);
      keep(kept_value, r, c, count, y);
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
      const auto kept = [&](float* to) { return to ? block.in_panel(to, f.hidden, p) + r * count : nullptr; };
      activate(gate + strip, value + strip, rows, count, hidden + p * panel_size(f.hidden) + r * PANEL, kept(f.gate),
               kept(f.value));
    }
  });

  float* out = x;  // x is done with
  whole_product(block, of_expert(f.w_out, block.expert), f.dim, f.hidden, hidden, out);
  scatter_slots(block, f.slots, out, f.dim, f.out);
}

// to[columns][rows] = the transpose of from[rows][columns], with nothing written beyond it.
void transpose_exactly(int rows, int columns, const float* from, float* to) {
  for (int r = 0; r < rows; r += 16)
    for (int c = 0; c < columns; c += 16)
      if (rows - r >= 16 && columns - c >= 16) {
        transpose_16x16(from + r * columns + c, columns, to + c * rows + r, rows);
      } else {
        for (int i = r; i < least(rows, r + 16); i++)
          for (int j = c; j < least(columns, c + 16); j++) to[j * rows + i] = from[i * columns + j];
      }
}

// The same for a block of few places.
void forward_few(const ExpertsForward& f, const Block& block) {
  const int count = block.count, gate_depth = f.rank > 0 ? f.rank : f.dim;
  float* x = scratch(size_t(count) * (2 * f.dim + f.rank + 2 * f.hidden + LANES));
  float *cache = x + count * f.dim, *out = cache + count * f.rank, *gate = out + count * f.dim;
  float* value = gate + count * f.hidden;
  const int32_t* slot = f.slots.order + block.first;
  for (int i = 0; i < count; i++) {
    std::memcpy(x + i * f.dim, f.x.data + slot[i] / f.slots.top_k * f.x.row, sizeof(float) * f.dim);
    if (f.rank > 0) std::memcpy(cache + i * f.rank, f.cache.data + slot[i] * f.cache.row, sizeof(float) * f.rank);
  }
  few_products(of_expert(f.w_gate, block.expert), f.hidden, gate_depth, f.rank > 0 ? cache : x, count, gate);
  few_products(of_expert(f.w_value, block.expert), f.hidden, f.dim, x, count, value);
  if (f.gate) transpose_exactly(count, f.hidden, gate, block.in_panel(f.gate, f.hidden, 0));
  if (f.value) transpose_exactly(count, f.hidden, value, block.in_panel(f.value, f.hidden, 0));
  for (int c = 0; c < count * f.hidden; c += LANES) {  // the last vector may go beyond, into `value` or the memory's end
    const Vec u = load(gate + c), hidden = u * sigmoid(u) * load(value + c);
    store_part(gate + c, hidden, least(LANES, count * f.hidden - c));
  }
  few_products(of_expert(f.w_out, block.expert), f.dim, f.hidden, gate, count, out);
  for (int i = 0; i < count; i++)
    std::memcpy(f.out + int64_t(slot[i]) * f.dim, out + i * f.dim, sizeof(float) * f.dim);
}

bool reads_few(const ExpertsForward& f) {
  return is_readable(f.w_gate, f.hidden) && is_readable(f.w_value, f.hidden) && is_readable(f.w_out, f.dim);
}

void combine_token(const ExpertsCombine& c, int64_t token) {
  const int64_t slot = token * c.top_k;
  const auto sum_from = [&](int d, auto read) {
    Vec total = {};
    for (int j = 0; j < c.top_k; j++)
      if (c.places[slot + j] >= 0)
        total += splat(c.weights ? c.weights[slot + j] : 1.f) * read(c.rows + (slot + j) * c.dim + d);
    return total;
  };
  float* out = c.out + token * c.dim;
  int d = 0;
  for (; d + LANES <= c.dim; d += LANES) store(out + d, sum_from(d, [](const float* from) { return load(from); }));
  const int rest = c.dim - d;
  if (rest) store_part(out + d, sum_from(d, [&](const float* from) { return load_part(from, rest); }), rest);
}

}  // namespace

void experts_forward(const ExpertsForward& f, const Parallel& parallel) {
  const bool few = reads_few(f);
  parallel(count_blocks(f.slots), [&](int64_t task) {
    const Block block = find_block(f.slots, task);
    few && block.count <= FEW ? forward_few(f, block) : forward_block(f, block);
  });
}

void experts_combine(const ExpertsCombine& c, const Parallel& parallel) {
  constexpr int64_t TOKENS = 64;
  parallel((c.tokens + TOKENS - 1) / TOKENS, [&](int64_t task) {
    for (int64_t t = task * TOKENS; t < least(c.tokens, (task + 1) * TOKENS); t++) combine_token(c, t);
  });
}

}  // namespace VOT_ISA
}  // namespace vot
