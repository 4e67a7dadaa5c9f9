#include "driver.h"

namespace vot {
namespace VOT_ISA {
namespace {

using Numbers = std::vector<float>;

// [experts][rows][columns] in memory of its own, or transposed in it.
struct Matrix {
  int rows, columns;
  bool transposed;
  Numbers numbers;

  Matrix(Random& random, int experts, int rows, int columns)
      : rows(rows), columns(columns), transposed(random.chance(0.5)),
        numbers(random.normals<float>(int64_t(experts) * rows * columns)) {
    for (float& x : numbers) x /= std::sqrt(float(columns));
  }
  int64_t row() const { return transposed ? 1 : columns; }
  int64_t column() const { return transposed ? rows : 1; }
  ExpertMatrices in() const { return {numbers.data(), int64_t(rows) * columns, row(), column()}; }
  ExpertGradients out() { return {numbers.data(), int64_t(rows) * columns, row(), column()}; }
  // Another one of the same shape, whose rows lie side by side.
  Matrix in_rows() const {
    Matrix other = *this;
    other.transposed = false;
    return other;
  }
  double at(int expert, int r, int c) const {
    return numbers[int64_t(expert) * rows * columns + r * row() + c * column()];
  }
};

// One problem of aoe or moe: every kernel runs on it, and sums over single numbers judge the results.
struct Problem {
  int64_t tokens;
  int experts, top_k, dim, rank, hidden;
  bool cached;
  Matrix w_gate, w_value, w_out, w_down;
  Numbers x, d_y, cache, weights;
  std::vector<int64_t> indices;
  std::vector<int32_t> order, places, offsets;

  explicit Problem(Random& random)
      : tokens(random.chance(0.1) ? 0 : random.whole(1, random.chance(0.25) ? 700 : 40)),
        experts(int(random.whole(1, 5))), top_k(int(random.whole(0, experts))), dim(int(random.whole(1, 70))),
        rank(int(random.whole(1, 20))), hidden(int(random.whole(1, 60))), cached(random.chance(0.5)),
        w_gate(random, experts, hidden, cached ? rank : dim), w_value(random, experts, hidden, dim),
        w_out(random, experts, dim, hidden), w_down(random, experts, rank, dim),
        x(random.normals<float>(tokens * dim)), d_y(random.normals<float>(tokens * dim)),
        cache(random.normals<float>(slots() * rank)), weights(random.normals<float>(slots())), indices(slots()),
        order(slots(), -1), places(slots(), -2), offsets(experts + 1, -1) {
    for (int64_t& expert : indices) expert = random.whole(random.chance(0.1) ? -1 : 0, experts - 1);
  }
  int64_t slots() const { return tokens * top_k; }
  ExpertSlots grouping() const { return {order.data(), offsets.data(), experts, top_k}; }
  ExpertRows rows(const Numbers& numbers, int width) const { return {numbers.data(), width}; }
  ExpertRows caches() const { return cached ? rows(cache, rank) : ExpertRows{}; }

  double gate(int expert, int64_t slot, int h) const {
    double sum = 0;
    if (cached)
      for (int r = 0; r < rank; r++) sum += w_gate.at(expert, h, r) * cache[slot * rank + r];
    else
      for (int d = 0; d < dim; d++) sum += w_gate.at(expert, h, d) * x[slot / top_k * dim + d];
    return sum;
  }
  double value(int expert, int64_t slot, int h) const {
    double sum = 0;
    for (int d = 0; d < dim; d++) sum += w_value.at(expert, h, d) * x[slot / top_k * dim + d];
    return sum;
  }
  double d_hidden(int expert, int64_t slot, int h) const {
    double sum = 0;
    for (int d = 0; d < dim; d++) sum += w_out.at(expert, d, h) * d_y[slot / top_k * dim + d];
    return sum;
  }
};

double silu(double x) { return x / (1 + std::exp(-x)); }
double silu_slope(double x) {
  const double s = 1 / (1 + std::exp(-x));
  return s + silu(x) * (1 - s);
}

void check_grouping(Problem& p, const Parallel& parallel) {
  kernels.experts_group({p.indices.data(), true, p.top_k, 1, p.tokens, p.experts, p.top_k, p.order.data(),
                         p.places.data(), p.offsets.data()},
                        parallel);
  for (int64_t slot = 0; slot < p.slots(); slot++) {
    const int64_t expert = p.indices[slot], place = p.places[slot];
    expect_close("place of no expert", place < 0, expert < 0, 0);
    if (expert < 0) continue;
    expect_close("order", p.order[place], slot, 0);
    expect_close("expert", place >= p.offsets[expert] && place < p.offsets[expert + 1], 1, 0);
  }
}

void check(Random& random, const Parallel& parallel) {
  Problem p(random);
  check_grouping(p, parallel);
  Numbers rows(p.slots() * p.dim, NAN), gate(p.slots() * p.hidden), value(p.slots() * p.hidden), y(p.tokens * p.dim);
  kernels.experts_forward({p.rows(p.x, p.dim), p.caches(), p.w_gate.in(), p.w_value.in(), p.w_out.in(), p.grouping(),
                           p.dim, p.cached ? p.rank : 0, p.hidden, rows.data(), p.cached ? nullptr : gate.data(), value.data()},
                          parallel);
  kernels.experts_combine({rows.data(), p.places.data(), p.weights.data(), p.tokens, p.top_k, p.dim, y.data()},
                          parallel);

  Numbers d_x(p.slots() * p.dim, NAN), d_cache(p.slots() * p.rank, NAN), d_weights(p.slots(), NAN);
  Matrix d_w_gate = p.w_gate.in_rows(), d_w_value = p.w_value.in_rows(), d_w_down = p.w_down.in_rows();
  Matrix d_w_out(random, p.experts, p.hidden, p.dim);
  kernels.experts_backward(
      {p.rows(p.d_y, p.dim), p.rows(p.x, p.dim), p.caches(), p.w_gate.in(), p.w_value.in(), p.w_out.in(),
       p.cached ? nullptr : gate.data(), value.data(), p.weights.data(), p.grouping(), p.dim, p.cached ? p.rank : 0, p.hidden,
       d_x.data(), p.cached ? d_cache.data() : nullptr, d_weights.data(), d_w_gate.out(), d_w_value.out(),
       d_w_out.out()},
      parallel);

  const int expert = int(random.whole(0, p.experts - 1)), h = int(random.whole(0, p.hidden - 1));
  const int d = int(random.whole(0, p.dim - 1));
  double sum_value = 0, sum_out = 0;
  for (int64_t slot = 0; slot < p.slots(); slot++) {
    if (p.indices[slot] != expert) continue;
    const double u = p.gate(expert, slot, h), v = p.value(expert, slot, h), weight = p.weights[slot];
    const double d_hidden = weight * p.d_hidden(expert, slot, h);
    sum_value += d_hidden * silu(u) * p.x[slot / p.top_k * p.dim + d];
    sum_out += weight * silu(u) * v * p.d_y[slot / p.top_k * p.dim + d];
  }
  const double scale = 1e-4 * (1 + std::sqrt(double(p.slots())));
  expect_close("d_w_value", d_w_value.at(expert, h, d), sum_value, scale);
  expect_close("d_w_out", d_w_out.at(expert, h, d), sum_out, scale);

  for (int64_t slot = 0; slot < p.slots(); slot += 7) {
    const int chosen = int(p.indices[slot]);
    if (chosen < 0) continue;
    double out = 0, d_value = 0, d_weight = 0;
    for (int i = 0; i < p.hidden; i++) {
      const double u = p.gate(chosen, slot, i), v = p.value(chosen, slot, i), d_hidden = p.d_hidden(chosen, slot, i);
      out += p.w_out.at(chosen, d, i) * silu(u) * v;
      d_weight += d_hidden * silu(u) * v;
      d_value += p.weights[slot] * d_hidden * silu(u) * p.w_value.at(chosen, i, d);
      if (!p.cached) d_value += p.weights[slot] * d_hidden * v * silu_slope(u) * p.w_gate.at(chosen, i, d);
    }
    expect_close("out", rows[slot * p.dim + d], out, 1e-3);
    expect_close("d_weight", d_weights[slot], d_weight, 1e-3);
    expect_close("d_x", d_x[slot * p.dim + d], d_value, 1e-3);
  }
  if (!p.cached) return;
  kernels.experts_cache_backward({p.rows(d_cache, p.rank), p.rows(p.x, p.dim), p.w_down.in(), p.grouping(), p.dim,
                                  p.rank, d_x.data(), d_w_down.out()},
                                 parallel);
}

void check_selection(Random& random, const Parallel& parallel) {
  Problem p(random);
  const int top_k = int(random.whole(1, p.experts));
  Numbers norms(p.tokens * p.experts), weights(p.tokens * top_k), cache(p.tokens * top_k * p.rank);
  std::vector<int64_t> chosen(p.tokens * top_k);
  kernels.aoe_select({p.rows(p.x, p.dim), p.w_down.in(), nullptr, p.tokens, p.experts, top_k, p.dim, p.rank,
                      random.chance(0.5), norms.data(), chosen.data(), weights.data(), cache.data()},
                     parallel);
  for (int64_t slot = 0; slot < p.tokens * top_k; slot++) {
    double square = 0;
    for (int r = 0; r < p.rank; r++) square += double(cache[slot * p.rank + r]) * cache[slot * p.rank + r];
    const double norm = norms[slot / top_k * p.experts + chosen[slot]];
    expect_close("norm", norm, std::sqrt(square), 1e-4);
    if (slot % top_k) expect_close("order of norms", norm <= norms[slot / top_k * p.experts + chosen[slot - 1]], 1, 0);
  }
}

Registered registered("experts", [](Random& random, const Parallel& parallel) {
  check(random, parallel);
  check_selection(random, parallel);
});

}  // namespace
}  // namespace VOT_ISA
}  // namespace vot
