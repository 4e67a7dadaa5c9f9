// Which experts a token chooses, and the choices grouped by expert.
#include "experts_blocks.h"

namespace vot {
namespace VOT_ISA {
namespace {

constexpr float LEAST_SQUARE = 1e-30f, GREATEST_SQUARE = 1e30f;  // beyond them squares may have vanished or overflown

// The norm of column `column` of [rank][PANEL], whatever the size of its entries.
float scaled_norm(const float* cache, int rank, int column) {
  float peak = 0;
  for (int r = 0; r < rank; r++) peak = most(peak, std::fabs(cache[r * PANEL + column]));
  if (!(peak > 0) || peak == INF) return peak;
  float squares = 0;
  for (int r = 0; r < rank; r++) {
    const float x = cache[r * PANEL + column] / peak;
    squares += x * x;
  }
  return peak * std::sqrt(squares);
}

// norms[column] of the columns of [rank][PANEL].
void norms_of(const float* cache, int rank, int width, float* norms) {
  for (int c = 0; c < width; c += LANES) {
    Vec squares = {};
    for (int r = 0; r < rank; r += STRIP) {  // in parts, so that rounding errors do not grow with the rank
      Vec part = {};
      for (int i = r; i < least(rank, r + STRIP); i++) part += load(cache + i * PANEL + c) * load(cache + i * PANEL + c);
      squares += part;
    }
    for (int i = 0; i < LANES; i++) {
      const bool ordinary = squares[i] != squares[i] || (squares[i] > LEAST_SQUARE && squares[i] < GREATEST_SQUARE);
      norms[c + i] = ordinary ? std::sqrt(squares[i]) : scaled_norm(cache, rank, c + i);
    }
  }
}

// The numbers of the `top_k` greatest scores, the greatest first, of equal ones the first; NaN is above all numbers.
void choose(const float* scores, int count, int top_k, int64_t* chosen) {
  const auto above = [](float a, float b) { return a > b || (a != a && b == b); };
  for (int e = 0; e < count; e++) {
    int place = least(e, top_k);
    for (; place > 0 && above(scores[e], scores[chosen[place - 1]]); place--)
      if (place < top_k) chosen[place] = chosen[place - 1];
    if (place < top_k) chosen[place] = e;
  }
}

// weights = the entries `chosen` of the softmax over all norms, or the softmax over these entries.
void mix(const float* norms, int experts, const int64_t* chosen, int top_k, bool softmax_first, float* weights) {
  const int terms = softmax_first ? experts : top_k;
  const auto term = [&](int i) { return norms[softmax_first ? i : chosen[i]]; };
  float peak = term(0), total = 0;
  for (int i = 1; i < terms; i++) peak = most(peak, term(i));
  for (int i = 0; i < terms; i++) total += std::exp(term(i) - peak);
  for (int j = 0; j < top_k; j++) weights[j] = std::exp(norms[chosen[j]] - peak) / total;
}

void select_panel(const AoeSelect& a, int64_t first) {
  const int count = int(least<int64_t>(PANEL, a.tokens - first)), width = int(round_up(count, UNIT));
  const Block block = {0, first, count, 1, width};
  const int64_t cache_size = int64_t(a.rank) * PANEL;
  float* x = scratch(size_t(panel_size(a.dim) + cache_size * a.experts + (PANEL + 1) * int64_t(a.experts)));
  float *caches = x + panel_size(a.dim), *norms = caches + cache_size * a.experts, *scores = norms + PANEL * a.experts;
  gather(block, a.dim, [&](int i) { return a.x.data + (first + i) * a.x.row; }, x);
  for (int e = 0; e < a.experts; e++) {
    float* cache = caches + e * cache_size;
    const Left w = of_expert(a.w_down, e);
    for_strips(a.rank, [&](int r, int rows) { product(block, w.below(r), rows, a.dim, x, cache + r * PANEL); });
    norms_of(cache, a.rank, width, norms + e * PANEL);
  }
  for (int i = 0; i < count; i++) {
    const int64_t token = first + i, slot = token * a.top_k;
    float* own = a.norms + token * a.experts;
    for (int e = 0; e < a.experts; e++) {
      own[e] = norms[e * PANEL + i];
      scores[e] = own[e] + (a.bias ? a.bias[e] : 0.f);
    }
    int64_t* chosen = a.indices + slot;
    choose(scores, a.experts, a.top_k, chosen);
    mix(own, a.experts, chosen, a.top_k, a.softmax_first, a.weights + slot);
    for (int j = 0; j < a.top_k; j++)
      for (int r = 0; r < a.rank; r++) a.cache[(slot + j) * a.rank + r] = caches[chosen[j] * cache_size + r * PANEL + i];
  }
}

}  // namespace

void aoe_select(const AoeSelect& a, const Parallel& parallel) {
  parallel((a.tokens + PANEL - 1) / PANEL, [&](int64_t task) { select_panel(a, task * PANEL); });
}

// One thread counts and places: it takes less time than the threads would take to agree.
void experts_group(const ExpertsGroup& g, const Parallel&) {
  const auto expert_of = [&](int64_t token, int choice) {
    const int64_t at = token * g.token_stride + choice * g.choice_stride;
    const int64_t id = g.wide ? static_cast<const int64_t*>(g.indices)[at] : static_cast<const int32_t*>(g.indices)[at];
    return id < 0 || id >= g.experts ? g.experts : int(id);  // those of no expert come last
  };
  const auto for_slots = [&](auto body) {
    for (int64_t t = 0, slot = 0; t < g.tokens; t++)
      for (int j = 0; j < g.top_k; j++, slot++) body(slot, expert_of(t, j));
  };
  int32_t* next = reinterpret_cast<int32_t*>(scratch(size_t(g.experts) + 2));
  for (int e = 0; e < g.experts + 2; e++) next[e] = 0;
  for_slots([&](int64_t, int expert) { next[expert + 1]++; });
  for (int e = 0; e < g.experts; e++) next[e + 1] += next[e];
  for (int e = 0; e <= g.experts; e++) g.offsets[e] = next[e];
  for_slots([&](int64_t slot, int expert) {
    const int32_t place = next[expert]++;
    g.order[place] = int32_t(slot);
    g.places[slot] = expert < g.experts ? place : -1;
  });
}

}  // namespace VOT_ISA
}  // namespace vot
