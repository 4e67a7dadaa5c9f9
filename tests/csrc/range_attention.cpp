#include "../../csrc/kernels/head_rows.h"
#include "driver.h"

namespace vot {
namespace VOT_ISA {
namespace {

// Two segments whose rows see their keys causally or in a window, and perhaps more keys as far, one by one; and the
// forward and backward in plain loops.
template <class T>
struct Problem {
  int heads, kv_heads, head_dim, width;
  float scale;
  bool has_far, has_pairs;
  std::vector<int32_t> low, high, reach_low, reach_high, row_slots;
  std::vector<RowsTask> row_tasks;
  std::vector<KeysTask> key_tasks;
  std::vector<SumTask> sum_tasks;
  std::vector<T> q, k, v, d_out, q_features, k_features;
  std::vector<float> states, mirrored, beta, d_lse;

  int64_t tokens() const { return int64_t(low.size()); }
  int64_t slots() const { return 2; }
  int64_t state_size() const { return int64_t(kv_heads) * width * state_row(head_dim); }

  Problem(Random& random) {
    kv_heads = int(random.whole(1, 2)), heads = kv_heads * int(random.whole(1, 3));
    head_dim = int(random.whole(1, random.chance(0.15) ? 90 : 20)), width = int(random.whole(1, 20));
    scale = random.normal() / std::sqrt(float(head_dim)), has_far = random.chance(0.7);
    has_pairs = has_far && random.chance(0.7);
    const int64_t before = random.whole(0, 50), after = random.whole(0, 50);
    const int64_t window = random.chance(0.5) ? 100000 : random.whole(0, 40);
    const bool causal = random.chance(0.5);
    for (int32_t segment = 0, begin = 0; segment < 2; segment++) {
      const int32_t end = begin + int32_t(random.whole(0, random.chance(0.1) ? 150 : 20));
      for (int64_t i = begin; i < end; i++) {
        low.push_back(int32_t(most<int64_t>(begin, i - window)));
        high.push_back(int32_t(causal ? i + 1 : least<int64_t>(end, i + window + 1)));
        reach_low.push_back(int32_t(most<int64_t>(begin, low.back() - (has_pairs ? before : 0))));
        reach_high.push_back(int32_t(least<int64_t>(end, high.back() + (has_pairs ? after : 0))));
        row_slots.push_back(random.chance(0.5) || !has_pairs ? segment : -1);
      }
      const int32_t half = (begin + end) / 2;
      for (const auto& [first, last] : {std::pair(begin, half), std::pair(half, end)})
        if (first < last) row_tasks.push_back({first, last, begin});
      if (begin < end) key_tasks.push_back({begin, end, begin, end, 0}), sum_tasks.push_back({begin, end, 0, 1});
      begin = end;
    }
    const int64_t rows = tokens();
    q = random.normals<T>(rows * heads * head_dim), d_out = random.normals<T>(rows * heads * head_dim);
    k = random.normals<T>(rows * kv_heads * head_dim), v = random.normals<T>(rows * kv_heads * head_dim);
    q_features = positive(random, rows * heads * width), k_features = positive(random, rows * kv_heads * width);
    states = far(random, true), mirrored = far(random, false), beta = random.normals<float>(heads);
    d_lse = random.normals<float>(rows * heads);
    if (random.chance(0.3)) beta[0] = -INFINITY;
  }

  static std::vector<T> positive(Random& random, int64_t count) {
    std::vector<T> numbers = random.normals<T>(count);
    for (T& x : numbers) put(&x, std::abs(to_float(x)));
    return numbers;
  }
  // States whose columns past the normaliser are 0; one of keys has a normaliser above 0.
  std::vector<float> far(Random& random, bool of_keys) const {
    std::vector<float> numbers = random.normals<float>(slots() * state_size());
    for (size_t i = 0; i < numbers.size(); i++) {
      const int64_t column = int64_t(i) % state_row(head_dim);
      if (column > head_dim) numbers[i] = 0;
      if (of_keys && column == head_dim) numbers[i] = 1 + std::abs(numbers[i]);
    }
    return numbers;
  }

  HeadRows rows(const std::vector<T>& x, int count, int size) const {
    return {const_cast<T*>(x.data()), int64_t(count) * size, size, DTYPE<T>};
  }
  FarRows far_rows(const std::vector<float>& from, const std::vector<T>& features, int count) const {
    if (!has_far) return {};
    return {from.data(), row_slots.data(), rows(features, count, width), FeatureMap::GIVEN, width};
  }
  FarPairs pairs(const std::vector<T>& features, int count) const {
    if (!has_pairs) return {};
    return {reach_low.data(), reach_high.data(), rows(features, count, width)};
  }
  bool is_near(int64_t row, int64_t key) const { return low[size_t(row)] <= key && key < high[size_t(row)]; }
  // The weight of a pair, before it is divided by the normaliser.
  double weight(int64_t row, int head, int64_t key) const {
    if (is_near(row, key)) return std::exp(score(row, head, key));
    double sum = 0;
    for (int f = 0; f < width; f++)
      sum += double(at(q_features, heads, width, row, head, f)) * at(k_features, kv_heads, width, key, kv_head(head), f);
    return sum * std::exp(double(beta[size_t(head)]));
  }
  float at(const std::vector<T>& x, int count, int size, int64_t token, int head, int column) const {
    return to_float(x[size_t((token * count + head) * size + column)]);
  }
  double score(int64_t row, int head, int64_t key) const {
    double sum = 0;
    for (int j = 0; j < head_dim; j++)
      sum += double(at(q, heads, head_dim, row, head, j)) * at(k, kv_heads, head_dim, key, kv_head(head), j);
    return sum * scale;
  }
  int kv_head(int head) const { return head / (heads / kv_heads); }
  double state(const std::vector<float>& from, int64_t token, int head, int feature, int column) const {
    return state_of_key(from, token, kv_head(head), feature, column);
  }
  double state_of_key(const std::vector<float>& from, int64_t token, int kv_head, int feature, int column) const {
    if (!has_far || row_slots[size_t(token)] < 0) return 0;
    const int64_t row = (row_slots[size_t(token)] * kv_heads + kv_head) * width + feature;
    return from[size_t(row * state_row(head_dim) + column)];
  }
  // phi(q) times a column of the state, with its weight.
  double far_sum(int64_t row, int head, int column) const {
    double sum = 0;
    if (has_far)
      for (int f = 0; f < width; f++)
        sum += double(at(q_features, heads, width, row, head, f)) * state(states, row, head, f, column);
    return sum * std::exp(double(beta[size_t(head)]));
  }
  // What the first step of the backward has written of a row's states; `delta` is d_out.out - d_lse.
  void check_far_row(int64_t row, int head, double total, double delta, const std::vector<float>& far_weight,
                     const std::vector<T>& d_q_features, const std::vector<float>& d_beta) const {
    const double weight = std::exp(double(beta[size_t(head)])) / total;
    const size_t at_head = size_t(row * heads + head);
    expect_close("far_weight", far_weight[at_head], weight, 1e-5 * (1 + weight));
    Sum beta_sum;
    for (int f = 0; f < width; f++) {
      Sum sum;
      for (int c = 0; c < head_dim; c++)
        sum.add(weight * at(d_out, heads, head_dim, row, head, c) * state(states, row, head, f, c));
      sum.add(-weight * delta * state(states, row, head, f, head_dim));
      expect_sum<T>("d_q_features", at(d_q_features, heads, width, row, head, f), sum);
      const double feature = at(q_features, heads, width, row, head, f);
      beta_sum.value += feature * sum.value, beta_sum.size += feature * sum.size;
    }
    expect_sum<float>("d_beta", d_beta[at_head], beta_sum);
  }
};

template <class T>
void check(Random& random, const Parallel& parallel) {
  const Problem<T> p(random);
  const int64_t rows = p.tokens(), pairs = rows * p.heads;
  const int d = p.head_dim;
  std::vector<T> out(size_t(pairs * d)), dq(out), dk(p.k), dv(p.v), d_q_features(p.q_features),
      d_k_features(p.k_features);
  std::vector<float> lse(size_t(pairs), NAN), delta(lse), far_weight(lse), d_beta(lse);
  std::vector<float> sums(size_t(pairs * d), NAN), feature_sums(size_t(pairs * p.width), 0);
  std::vector<float> pair_d_beta(size_t(pairs), 0);
  const HeadRows q = p.rows(p.q, p.heads, d), k = p.rows(p.k, p.kv_heads, d), v = p.rows(p.v, p.kv_heads, d);
  const HeadRows d_out = p.rows(p.d_out, p.heads, d);
  const FarRows far = p.far_rows(p.states, p.q_features, p.heads);
  const int64_t row_tasks = int64_t(p.row_tasks.size()), key_tasks = int64_t(p.key_tasks.size());

  kernels.range_attention_forward(
      {q, k, v, p.rows(out, p.heads, d), lse.data(), p.heads, p.kv_heads, d, p.scale, p.low.data(), p.high.data(),
       p.row_tasks.data(), row_tasks, far, p.pairs(p.k_features, p.kv_heads), p.beta.data()},
      parallel);
  kernels.range_attention_rows_backward(
      {d_out, p.rows(out, p.heads, d), lse.data(), p.d_lse.data(), delta.data(), p.heads, p.kv_heads, d, p.row_tasks.data(),
       row_tasks, far, p.beta.data(), far_weight.data(), d_beta.data(), p.rows(d_q_features, p.heads, p.width)},
      parallel);
  kernels.range_attention_keys_backward(
      {d_out, q, k, v, p.rows(dk, p.kv_heads, d), p.rows(dv, p.kv_heads, d), lse.data(), delta.data(), nullptr,
       sums.data(), rows, p.heads, p.kv_heads, d, p.scale, p.low.data(), p.high.data(), p.key_tasks.data(), key_tasks,
       p.far_rows(p.mirrored, p.k_features, p.kv_heads), p.rows(d_k_features, p.kv_heads, p.width),
       p.pairs(p.q_features, p.heads), far_weight.data(), pair_d_beta.data(), feature_sums.data()},
      parallel);
  kernels.range_attention_sum_parts({nullptr, sums.data(), p.rows(dq, p.heads, d), rows, p.heads, d,
                                     p.sum_tasks.data(), int64_t(p.sum_tasks.size())},
                                    parallel);

  std::vector<double> expected_dv(p.v.size(), 0), expected_d_features(p.k_features.size(), 0);
  std::vector<Sum> expected_dk(p.k.size());
  for (int64_t j = 0; j < rows; j++)
    for (int h = 0; h < p.kv_heads; h++)
      for (int f = 0; f < p.width; f++) {
        double& d_k_feature = expected_d_features[size_t((j * p.kv_heads + h) * p.width + f)];
        d_k_feature = p.state_of_key(p.mirrored, j, h, f, d);
        for (int c = 0; c < d; c++) {
          const double state = p.state_of_key(p.mirrored, j, h, f, c);
          d_k_feature += p.at(p.v, p.kv_heads, d, j, h, c) * state;
          expected_dv[size_t((j * p.kv_heads + h) * d + c)] += p.at(p.k_features, p.kv_heads, p.width, j, h, f) * state;
        }
      }
  for (int64_t i = 0; i < rows; i++)
    for (int h = 0; h < p.heads; h++) {
      double total = p.far_sum(i, h, d), product = 0;
      std::vector<double> expected(size_t(d), 0), gradient(size_t(d), 0);
      for (int c = 0; c < d; c++) expected[c] = p.far_sum(i, h, c);
      for (int64_t j = p.reach_low[i]; j < p.reach_high[i]; j++) {
        const double weight = p.weight(i, h, j);
        total += weight;
        for (int c = 0; c < d; c++) expected[c] += weight * p.at(p.v, p.kv_heads, d, j, p.kv_head(h), c);
      }
      for (int c = 0; c < d; c++) {
        expect_close("out", to_float(out[(i * p.heads + h) * d + c]), expected[c] / total, tolerance<T>(20));
        product += double(to_float(out[(i * p.heads + h) * d + c])) * p.at(p.d_out, p.heads, d, i, h, c);
      }
      product -= p.d_lse[size_t(i * p.heads + h)];
      expect_close("lse", lse[i * p.heads + h], std::log(total), 1e-4);
      expect_close("delta", delta[i * p.heads + h], product, 1e-4 * d);
      if (p.has_far) p.check_far_row(i, h, total, product, far_weight, d_q_features, d_beta);
      std::vector<double> d_features(size_t(p.width), 0);
      double d_pair_beta = 0;
      for (int64_t j = p.reach_low[i]; j < p.reach_high[i]; j++) {
        double d_weight = -product;
        for (int c = 0; c < d; c++)
          d_weight += double(p.at(p.d_out, p.heads, d, i, h, c)) * p.at(p.v, p.kv_heads, d, j, p.kv_head(h), c);
        const double share = p.weight(i, h, j) / total;
        for (int c = 0; c < d; c++)
          expected_dv[size_t((j * p.kv_heads + p.kv_head(h)) * d + c)] += share * p.at(p.d_out, p.heads, d, i, h, c);
        if (p.is_near(i, j)) {
          for (int c = 0; c < d; c++) {
            const double d_score = share * d_weight * p.scale;
            gradient[c] += d_score * p.at(p.k, p.kv_heads, d, j, p.kv_head(h), c);
            expected_dk[size_t((j * p.kv_heads + p.kv_head(h)) * d + c)].add(d_score * p.at(p.q, p.heads, d, i, h, c));
          }
          continue;
        }
        const double far_gradient = std::exp(double(p.beta[size_t(h)])) / total * d_weight;
        d_pair_beta += share * d_weight;
        for (int f = 0; f < p.width; f++) {
          d_features[f] += far_gradient * p.at(p.k_features, p.kv_heads, p.width, j, p.kv_head(h), f);
          expected_d_features[size_t((j * p.kv_heads + p.kv_head(h)) * p.width + f)] +=
              far_gradient * p.at(p.q_features, p.heads, p.width, i, h, f);
        }
      }
      expect_close("d_beta of pairs", pair_d_beta[size_t(i * p.heads + h)], d_pair_beta, tolerance<T>(20.0 * d));
      for (int f = 0; f < p.width; f++)
        expect_close("d_q_features of pairs", feature_sums[size_t((i * p.heads + h) * p.width + f)], d_features[f],
                     tolerance<T>(20.0 * d));
      for (int c = 0; c < d; c++)
        expect_close("dq", to_float(dq[(i * p.heads + h) * d + c]), gradient[c], tolerance<T>(20.0 * d));
    }
  for (size_t i = 0; i < expected_dv.size(); i++)
    expect_close("dv", to_float(dv[i]), expected_dv[i], tolerance<T>(20.0 * d));
  for (size_t i = 0; i < expected_dk.size(); i++) expect_sum<T>("dk", to_float(dk[i]), expected_dk[i]);
  for (size_t i = 0; p.has_far && i < expected_d_features.size(); i++)
    expect_close("d_k_features", to_float(d_k_features[i]), expected_d_features[i], tolerance<T>(20.0 * d));
}

Registered registered("range_attention", [](Random& random, const Parallel& parallel) {
  for_each_type([&](auto zero) { check<decltype(zero)>(random, parallel); });
});

}  // namespace
}  // namespace VOT_ISA
}  // namespace vot
