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

// One problem of aoe or moe, which every kernel runs on.
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

  // Of a slot that an expert has and a hidden unit: what the kernels compute on the way, for a weight of 1.
  struct Unit {
    double gate = 0, value = 0, d_hidden = 0;
  };
  std::vector<Unit> units(int expert, int64_t slot) const {
    std::vector<Unit> result(hidden);
    const float *row = x.data() + slot / top_k * dim, *gradient = d_y.data() + slot / top_k * dim;
    for (int h = 0; h < hidden; h++) {
      Unit& unit = result[h];
      for (int d = 0; d < dim; d++) {
        unit.value += w_value.at(expert, h, d) * row[d];
        unit.d_hidden += w_out.at(expert, d, h) * gradient[d];
        if (!cached) unit.gate += w_gate.at(expert, h, d) * row[d];
      }
      for (int r = 0; cached && r < rank; r++) unit.gate += w_gate.at(expert, h, r) * cache[slot * rank + r];
    }
    return result;
  }
  // What a gate is computed from.
  const float* gate_input(int64_t slot) const {
    return cached ? cache.data() + slot * rank : x.data() + slot / top_k * dim;
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

// What the kernels write.
struct Results {
  Numbers rows, gate, value, y, d_x, d_cache, d_weights;
  Matrix d_w_gate, d_w_value, d_w_out, d_w_down;

  Results(Random& random, const Problem& p)
      : rows(p.slots() * p.dim, NAN), gate(p.slots() * p.hidden, NAN), value(gate), y(p.tokens * p.dim, NAN), d_x(rows),
        d_cache(p.slots() * p.rank, NAN), d_weights(p.slots(), NAN), d_w_gate(p.w_gate.in_rows()),
        d_w_value(p.w_value.in_rows()), d_w_out(random, p.experts, p.hidden, p.dim), d_w_down(p.w_down.in_rows()) {}
};

void run(const Problem& p, Results& r, const Parallel& parallel) {
  const int rank = p.cached ? p.rank : 0;
  float* gate = p.cached ? nullptr : r.gate.data();
  kernels.experts_forward({p.rows(p.x, p.dim), p.caches(), p.w_gate.in(), p.w_value.in(), p.w_out.in(), p.grouping(),
                           p.dim, rank, p.hidden, r.rows.data(), gate, r.value.data()},
                          parallel);
  kernels.experts_combine({r.rows.data(), p.places.data(), p.weights.data(), p.tokens, p.top_k, p.dim, r.y.data()},
                          parallel);
  kernels.experts_backward({p.rows(p.d_y, p.dim), p.rows(p.x, p.dim), p.caches(), p.w_gate.in(), p.w_value.in(),
                            p.w_out.in(), gate, r.value.data(), p.weights.data(), p.grouping(), p.dim, rank, p.hidden,
                            r.d_x.data(), p.cached ? r.d_cache.data() : nullptr, r.d_weights.data(), r.d_w_gate.out(),
                            r.d_w_value.out(), r.d_w_out.out()},
                           parallel);
}

void check_slot(const Problem& p, const Results& r, int expert, int64_t slot, const std::vector<Problem::Unit>& units) {
  std::vector<Sum> out(p.dim), d_x(p.dim), d_cache(p.rank);
  Sum d_weight;
  for (int h = 0; h < p.hidden; h++) {
    const auto& [gate, value, d_hidden] = units[h];
    const double d_value = p.weights[slot] * d_hidden * silu(gate);
    const double d_gate = p.weights[slot] * d_hidden * value * silu_slope(gate);
    d_weight.add(d_hidden * silu(gate) * value);
    for (int d = 0; d < p.dim; d++) {
      out[d].add(p.w_out.at(expert, d, h) * silu(gate) * value);
      d_x[d].add(d_value * p.w_value.at(expert, h, d));
      if (!p.cached) d_x[d].add(d_gate * p.w_gate.at(expert, h, d));
    }
    for (int i = 0; p.cached && i < p.rank; i++) d_cache[i].add(d_gate * p.w_gate.at(expert, h, i));
  }
  expect_sum<float>("d_weight", r.d_weights[slot], d_weight);
  for (int d = 0; d < p.dim; d++) {
    expect_sum<float>("out", r.rows[slot * p.dim + d], out[d]);
    expect_sum<float>("d_x", r.d_x[slot * p.dim + d], d_x[d]);
  }
  for (int i = 0; p.cached && i < p.rank; i++) expect_sum<float>("d_cache", r.d_cache[slot * p.rank + i], d_cache[i]);
}

// Compares a matrix of an expert's gradient.
void check_gradient(const char* what, const Matrix& found, int expert, const std::vector<Sum>& expected) {
  for (int i = 0; i < found.rows; i++)
    for (int j = 0; j < found.columns; j++)
      expect_sum<float>(what, found.at(expert, i, j), expected[i * found.columns + j]);
}

// The gradients of an expert's matrices, and what one in sixteen of its slots has.
void check_expert(const Problem& p, const Results& r, int expert) {
  const int gate_inputs = p.w_gate.columns;
  std::vector<Sum> d_w_gate(p.hidden * gate_inputs), d_w_value(p.hidden * p.dim), d_w_out(d_w_value);
  int count = 0;
  for (int64_t slot = 0; slot < p.slots(); slot++) {
    if (p.indices[slot] != expert) continue;
    const std::vector<Problem::Unit> units = p.units(expert, slot);
    if (count++ % 16 == 0) check_slot(p, r, expert, slot, units);
    const float *x = p.x.data() + slot / p.top_k * p.dim, *d_y = p.d_y.data() + slot / p.top_k * p.dim;
    for (int h = 0; h < p.hidden; h++) {
      const auto& [gate, value, d_hidden] = units[h];
      const double weight = p.weights[slot], unit = weight * silu(gate) * value;
      const double d_value = weight * d_hidden * silu(gate), d_gate = weight * d_hidden * value * silu_slope(gate);
      for (int d = 0; d < p.dim; d++) d_w_value[h * p.dim + d].add(d_value * x[d]);
      for (int d = 0; d < p.dim; d++) d_w_out[h * p.dim + d].add(unit * d_y[d]);
      for (int i = 0; i < gate_inputs; i++) d_w_gate[h * gate_inputs + i].add(d_gate * p.gate_input(slot)[i]);
    }
  }
  check_gradient("d_w_gate", r.d_w_gate, expert, d_w_gate);
  check_gradient("d_w_value", r.d_w_value, expert, d_w_value);
  check_gradient("d_w_out", r.d_w_out, expert, d_w_out);
}

void check_combine(const Problem& p, const Results& r) {
  for (int64_t token = 0; token < p.tokens; token++)
    for (int d = 0; d < p.dim; d++) {
      Sum y;
      for (int64_t slot = token * p.top_k; slot < (token + 1) * p.top_k; slot++)
        if (p.indices[slot] >= 0) y.add(double(p.weights[slot]) * r.rows[slot * p.dim + d]);
      expect_sum<float>("y", r.y[token * p.dim + d], y);
    }
}

// The gradients through the caches, given those of the caches.
void check_cache_backward(const Problem& p, Results& r, const Parallel& parallel) {
  const Numbers before = r.d_x;
  kernels.experts_cache_backward({p.rows(r.d_cache, p.rank), p.rows(p.x, p.dim), p.w_down.in(), p.grouping(), p.dim,
                                  p.rank, r.d_x.data(), r.d_w_down.out()},
                                 parallel);
  std::vector<std::vector<Sum>> d_w_down(p.experts, std::vector<Sum>(p.rank * p.dim));
  for (int64_t slot = 0; slot < p.slots(); slot++) {
    const int expert = int(p.indices[slot]);
    if (expert < 0) continue;
    std::vector<Sum>& gradient = d_w_down[expert];
    for (int d = 0; d < p.dim; d++) {
      Sum d_x;
      d_x.add(before[slot * p.dim + d]);
      for (int i = 0; i < p.rank; i++) {
        const double d_cache = r.d_cache[slot * p.rank + i];
        d_x.add(d_cache * p.w_down.at(expert, i, d));
        gradient[i * p.dim + d].add(d_cache * p.x[slot / p.top_k * p.dim + d]);
      }
      expect_sum<float>("d_x with the cache's", r.d_x[slot * p.dim + d], d_x);
    }
  }
  for (int expert = 0; expert < p.experts; expert++)
    check_gradient("d_w_down", r.d_w_down, expert, d_w_down[expert]);
}

void check(Random& random, const Parallel& parallel) {
  Problem p(random);
  check_grouping(p, parallel);
  Results results(random, p);
  run(p, results, parallel);
  check_combine(p, results);
  for (int expert = 0; expert < p.experts; expert++) check_expert(p, results, expert);
  if (p.cached) check_cache_backward(p, results, parallel);
}

void check_selection(Random& random, const Parallel& parallel) {
  Problem p(random);
  const int top_k = int(random.whole(1, p.experts));
  const bool biased = random.chance(0.5), softmax_first = random.chance(0.5);
  const Numbers bias = random.normals<float>(p.experts);
  Numbers norms(p.tokens * p.experts, NAN), weights(p.tokens * top_k, NAN), cache(p.tokens * top_k * p.rank, NAN);
  std::vector<int64_t> chosen(p.tokens * top_k, -1);
  kernels.aoe_select({p.rows(p.x, p.dim), p.w_down.in(), biased ? bias.data() : nullptr, p.tokens, p.experts, top_k,
                      p.dim, p.rank, softmax_first, norms.data(), chosen.data(), weights.data(), cache.data()},
                     parallel);
  for (int64_t token = 0; token < p.tokens; token++) {
    const float* own = norms.data() + token * p.experts;
    const auto score = [&](int64_t expert) { return own[expert] + (biased ? bias[expert] : 0.f); };
    std::vector<bool> is_chosen(p.experts);
    double total = 0, least_chosen = INFINITY;
    for (int64_t slot = token * top_k; slot < (token + 1) * top_k; slot++) {
      expect_close("a choice", is_chosen[chosen[slot]], false, 0);
      expect_close("order of scores", score(chosen[slot]) <= least_chosen, 1, 0);
      is_chosen[chosen[slot]] = true, least_chosen = score(chosen[slot]);
    }
    for (int e = 0; e < p.experts; e++) {
      double squares = 0, size = 0;
      for (int r = 0; r < p.rank; r++) {
        Sum sum;
        for (int d = 0; d < p.dim; d++) sum.add(p.w_down.at(e, r, d) * p.x[token * p.dim + d]);
        squares += sum.value * sum.value, size += sum.size;
        for (int64_t slot = token * top_k; slot < (token + 1) * top_k; slot++)
          if (chosen[slot] == e) expect_sum<float>("cache", cache[slot * p.rank + r], sum);
      }
      expect_close("norm", own[e], std::sqrt(squares), tolerance<float>(1 + size));
      if (!is_chosen[e]) expect_close("a better choice", score(e) <= least_chosen, 1, 0);
      if (softmax_first || is_chosen[e]) total += std::exp(double(own[e]));
    }
    for (int64_t slot = token * top_k; slot < (token + 1) * top_k; slot++)
      expect_close("weight", weights[slot], std::exp(double(own[chosen[slot]])) / total, tolerance<float>(1));
  }
}

Registered registered("experts", [](Random& random, const Parallel& parallel) {
  check(random, parallel);
  check_selection(random, parallel);
});

}  // namespace
}  // namespace VOT_ISA
}  // namespace vot
