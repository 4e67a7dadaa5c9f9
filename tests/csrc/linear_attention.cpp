#include "heads.h"

namespace vot {
namespace VOT_ISA {
namespace {

using Row = std::vector<double>;

struct Sizes {
  int kv_heads, heads, head_dim;
  std::vector<int32_t> bounds{0};
  int64_t tokens;

  explicit Sizes(Random& random) {
    kv_heads = int(random.whole(1, 3));
    heads = kv_heads * int(random.whole(1, 3));
    head_dim = int(random.chance(0.2) ? random.whole(60, 140) : random.whole(1, 40));
    const int64_t segments = random.whole(0, 4);
    for (int64_t s = 0; s < segments; s++) {
      const int64_t rows = random.chance(0.2) ? 0 : random.whole(1, random.chance(0.1) ? 1200 : 100);
      bounds.push_back(bounds.back() + int32_t(rows));
    }
    tokens = bounds.back() + random.whole(0, 2);
  }
};

// A sum of products phi x^T of rows.
struct State {
  size_t width, columns;
  Row numbers;

  State(size_t width, size_t columns) : width(width), columns(columns), numbers(width * columns) {}
  void add(const Row& phi, const Row& x) {
    for (size_t f = 0; f < width; f++) add_scaled(columns, phi[f], x.data(), numbers.data() + f * columns);
  }
  Row times(const Row& x) const {
    Row result(width);
    for (size_t f = 0; f < width; f++) {
      const double *row = numbers.data() + f * columns, *column = x.data();
      double sum = 0;
      for (size_t c = 0; c < columns; c++) sum += row[c] * column[c];
      result[f] = sum;
    }
    return result;
  }
  Row from_left(const Row& phi) const {
    Row result(columns);
    for (size_t f = 0; f < width; f++) add_scaled(columns, phi[f], numbers.data() + f * columns, result.data());
    return result;
  }

 private:
  static void add_scaled(size_t count, double factor, const double* x, double* sum) {
    for (size_t c = 0; c < count; c++) sum[c] += factor * x[c];
  }
};

// One head of a segment, row by row; of a key head, what comes through this head. With `sizes` every term is replaced by
// its absolute value: rounding errors are in proportion to these sums.
struct Head {
  FeatureMap map;
  bool causal, sizes;
  std::vector<Row> q, k, v, d_out;  // v ends with a 1
  std::vector<Row> out, dq, dk, dv;
  Row total;

  void run() {
    const size_t rows = q.size(), width = rows ? q[0].size() : 0;
    State keys(width, width + 1), queries(width, width + 1);
    std::vector<Row> phi_q, phi_k, gradients;
    for (size_t i = 0; i < rows; i++) phi_q.push_back(features(map, q[i])), phi_k.push_back(features(map, k[i]));
    for (size_t j = 0; j < rows && !causal; j++) keys.add(phi_k[j], v[j]);
    for (size_t i = 0; i < rows; i++) {
      if (causal) keys.add(phi_k[i], v[i]);
      out.push_back(keys.from_left(phi_q[i]));
      total.push_back(out[i][width]);
      gradients.push_back(gradient_of_sums(i));
      dq.push_back(through_map(q[i], phi_q[i], keys.times(gradients[i])));
    }
    dk.resize(rows), dv.resize(rows);
    for (size_t i = 0; i < rows && !causal; i++) queries.add(phi_q[i], gradients[i]);
    for (size_t j = rows; j-- > 0;) {
      if (causal) queries.add(phi_q[j], gradients[j]);
      dk[j] = through_map(k[j], phi_k[j], queries.times(v[j]));
      dv[j] = queries.from_left(phi_k[j]);
    }
  }

 private:
  // Divides out[i] by the total of its weights; returns the gradient of what it was, and of the total.
  Row gradient_of_sums(size_t i) {
    const double inverse = total[i] > 0 ? 1 / total[i] : 0;
    double product = 0;
    Row result;
    for (size_t c = 0; c < d_out[i].size(); c++) {
      out[i][c] *= inverse;
      product += d_out[i][c] * out[i][c];
      result.push_back(d_out[i][c] * inverse);
    }
    result.push_back((sizes ? product : -product) * inverse);
    return result;
  }
  Row through_map(const Row& x, const Row& phi, Row gradient) const {
    double mean = 0;
    for (size_t f = 0; f < x.size(); f++) mean += phi[f] * gradient[f];
    for (size_t f = 0; f < x.size(); f++) {
      if (map == FeatureMap::SOFTMAX) gradient[f] = phi[f] * (gradient[f] + (sizes ? mean : -mean));
      if (map == FeatureMap::ELU && x[f] <= 0) gradient[f] *= phi[f];
      if (map == FeatureMap::RELU && x[f] <= 0) gradient[f] = 0;
    }
    return gradient;
  }
};

template <class T>
struct Problem {
  Sizes sizes;
  FeatureMap map;
  bool causal;
  Block<T> q, k, v, d_out, out, dq, dk, dv;
  std::vector<float> inverse;

  explicit Problem(Random& random)
      : sizes(random), map(FeatureMap(random.whole(0, 2))), causal(random.chance(0.5)), q(block(random, sizes.heads)),
        k(block(random, sizes.kv_heads)), v(block(random, sizes.kv_heads)), d_out(block(random, sizes.heads)), out(q),
        dq(q), dk(k), dv(v), inverse(size_t(sizes.tokens * sizes.heads), NAN) {}
  Block<T> block(Random& random, int heads) const { return {random, sizes.tokens, heads, sizes.head_dim}; }
  int repeats() const { return sizes.heads / sizes.kv_heads; }

  void run(const Parallel& parallel) {
    const LinearAttention inputs{DTYPE<T>, map, causal, sizes.heads, sizes.kv_heads, sizes.head_dim, sizes.tokens,
                                 int64_t(sizes.bounds.size()) - 1, sizes.bounds.data(), q.rows(), k.rows(), v.rows()};
    kernels.linear_attention_forward({inputs, out.mutable_rows(), inverse.data()}, parallel);
    kernels.linear_attention_backward(
        {inputs, d_out.rows(), inverse.data(), dq.mutable_rows(), dk.mutable_rows(), dv.mutable_rows()}, parallel);
  }
  Head head(int64_t begin, int64_t end, int number, bool of_sizes) const {
    const auto part = [&](const Row& x) {
      Row result = x;
      for (double& number : result) number = of_sizes ? std::fabs(number) : number;
      return result;
    };
    Head result{map, causal, of_sizes, {}, {}, {}, {}, {}, {}, {}, {}, {}};
    for (int64_t i = begin; i < end; i++) {
      result.q.push_back(q.row(i, number)), result.k.push_back(k.row(i, number / repeats()));
      result.v.push_back(part(v.row(i, number / repeats()))), result.d_out.push_back(part(d_out.row(i, number)));
      result.v.back().push_back(1);
    }
    result.run();
    return result;
  }
  // The heads that share a key head, in the rows of one segment.
  void check_heads(int64_t begin, int64_t end, int key) const {
    std::vector<std::vector<Sum>> expected_dk(size_t(end - begin), std::vector<Sum>(size_t(sizes.head_dim)));
    std::vector<std::vector<Sum>> expected_dv(expected_dk);
    for (int h = key * repeats(); h < (key + 1) * repeats(); h++) {
      const Head exact = head(begin, end, h, false), of_sizes = head(begin, end, h, true);
      for (size_t i = 0; i < exact.q.size(); i++) {
        const double found = std::ldexp(double(inverse[size_t((begin + int64_t(i)) * sizes.heads + h)]), 32);
        expect_close("inverse", found * exact.total[i], exact.total[i] > 0, 1e-5);
        for (int c = 0; c < sizes.head_dim; c++) {
          const auto sum = [&](const std::vector<Row> Head::*rows) {
            return Sum{(exact.*rows)[i][size_t(c)], (of_sizes.*rows)[i][size_t(c)]};
          };
          expect_sum<T>("out", out.at(begin + int64_t(i), h, c), sum(&Head::out));
          expect_sum<T>("dq", dq.at(begin + int64_t(i), h, c), sum(&Head::dq));
          expected_dk[i][size_t(c)].add(sum(&Head::dk));
          expected_dv[i][size_t(c)].add(sum(&Head::dv));
        }
      }
    }
    for (int64_t j = begin; j < end; j++)
      for (int c = 0; c < sizes.head_dim; c++) {
        expect_sum<T>("dk", dk.at(j, key, c), expected_dk[size_t(j - begin)][size_t(c)]);
        expect_sum<T>("dv", dv.at(j, key, c), expected_dv[size_t(j - begin)][size_t(c)]);
      }
  }
  void check_slack() const {
    for (int64_t i = sizes.bounds.back(); i < sizes.tokens; i++)
      for (int c = 0; c < sizes.head_dim; c++) {
        for (int h = 0; h < sizes.heads; h++) expect_close("slack of out", out.at(i, h, c), 0, 0);
        for (int h = 0; h < sizes.heads; h++) expect_close("slack of dq", dq.at(i, h, c), 0, 0);
        for (int h = 0; h < sizes.kv_heads; h++) expect_close("slack of dk", dk.at(i, h, c), 0, 0);
        for (int h = 0; h < sizes.kv_heads; h++) expect_close("slack of dv", dv.at(i, h, c), 0, 0);
      }
  }
};

template <class T>
void check(Random& random, const Parallel& parallel) {
  Problem<T> problem(random);
  problem.run(parallel);
  const std::vector<int32_t>& bounds = problem.sizes.bounds;
  for (size_t s = 0; s + 1 < bounds.size(); s++)
    for (int key = 0; key < problem.sizes.kv_heads; key++) problem.check_heads(bounds[s], bounds[s + 1], key);
  problem.check_slack();
}

Registered registered("linear_attention", [](Random& random, const Parallel& parallel) {
  for_each_type([&](auto zero) { check<decltype(zero)>(random, parallel); });
});

}  // namespace
}  // namespace VOT_ISA
}  // namespace vot
