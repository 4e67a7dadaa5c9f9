// Rows see each other through states S = sum of phi(k_j) v_j^T, and only those of one block one by one.
//
// With g_i = [do_i, -do_i.o_i] and c_i = 1 / Z_i the results are sums of one shape:
//
//   o_i       = c_i phi(q_i) S         S  = sum_j phi(k_j) [v_j, 1]^T
//   dphi(q_i) = c_i S g_i
//   dv_j      = phi(k_j) dS            dS = sum_i c_i phi(q_i) g_i^T
//   dphi(k_j) = dS [v_j, 1]
//
// over all rows of a segment, or over those up to i. Segments are cut into tiles. If causal, a tile begins with the sum
// over the earlier tiles (on the way back: the later ones) and carries it from block to block. The output is not needed
// in the backward: do_i.o_i is phi(q_i).(S do_i) c_i, and S do_i is needed anyway.
#include "linear_attention.h"

#include "group_states.h"
#include "head_blocks.h"
#include "rows.h"
#include "scratch.h"
#include "tile.h"

namespace vot {
namespace VOT_ISA {
namespace {

constexpr float SCALE = 4294967296.f;  // of phi(k): Z would be subnormal without it, and 1 / Z infinite
constexpr float LEAST = 0x1p-110f;     // a sum of scaled weights below it is 0: gradients would overflow
constexpr int OWN_ROWS = 16;           // rows that see others one by one are taken so many at a time, and skip the rest
constexpr int MOST_WIDTH = 256;

// Which rows of its block a row sees one by one: all, itself and the earlier ones, or itself and the later ones.
enum class Seen { ALL, EARLIER, LATER };

struct Tile {
  int32_t begin, end;
  int32_t part;  // number of its own state; -1 if none is needed, for no other tile sees it
  int32_t slot;  // number of the state of the rows that it sees beyond itself, or -1
};

// How the rows are cut into tiles. Those of long segments have states of their own; what a tile sees is the sum over its
// segment, or if causal over the tiles before it.
struct Plan {
  Tile* tiles;
  int64_t num_tiles, num_parts, num_segments;
  int32_t *begins, *ends;  // [num_parts], rows of the tiles that have states
  int32_t* bounds;         // [num_segments + 1], parts: of each segment that has them
};

Plan make_plan(const LinearAttention& inputs) {
  const int64_t most_tiles = inputs.segments + inputs.tokens / 512 + 1;
  int32_t* memory = reinterpret_cast<int32_t*>(scratch<3>(size_t(most_tiles * 7)));
  Plan plan{reinterpret_cast<Tile*>(memory), 0, 0, 0, memory + 4 * most_tiles, memory + 5 * most_tiles,
            memory + 6 * most_tiles};
  plan.bounds[0] = 0;
  for (int64_t s = 0; s < inputs.segments; s++) {
    const int64_t begin = inputs.bounds[s], rows = inputs.bounds[s + 1] - begin, parts = parts_of_rows(rows);
    const bool has_states = inputs.causal ? parts > 1 : rows > BLOCK_ROWS;
    for (int64_t i = 0; rows && i < parts; i++) {
      Tile tile{int32_t(begin + rows * i / parts), int32_t(begin + rows * (i + 1) / parts), -1, -1};
      if (has_states) {
        tile.part = int32_t(plan.num_parts++);
        tile.slot = inputs.causal ? tile.part : int32_t(plan.num_segments);
        plan.begins[tile.part] = tile.begin;
        plan.ends[tile.part] = tile.end;
      }
      plan.tiles[plan.num_tiles++] = tile;
    }
    if (has_states) plan.bounds[++plan.num_segments] = int32_t(plan.num_parts);
  }
  return plan;
}

struct Shape {
  int width;
  int64_t padded;     // width in whole vectors
  int64_t row, size;  // of a state, and of a state of one head
  int64_t turned;     // row of a transposed state

  explicit Shape(const LinearAttention& inputs)
      : width(inputs.head_dim),
        padded(round_up(width, LANES)),
        row(state_row(width)),
        size(width * row),
        turned(round_up(width, 16)) {}
};

// Hands out pieces of the scratch memory.
struct Memory {
  float* next;
  float* take(int64_t count) {
    float* piece = next;
    next += round_up(count, 16);
    return piece;
  }
};

// state += features^T . values and total += features^T . last, of rows [rows][padded]; `last` is 1 if null.
void add_to_state(const Shape& shape, int rows, const float* features, const float* values, const float* last, float* state,
                  float* total, Old old, Fetch<1>& fetch) {
  multiply(shape.width, int(shape.padded), Left{features, 1, shape.padded}, Right{values, shape.padded}, rows,
           Result{state, shape.row}, old, nullptr, fetch);
  for (int64_t c = 0; c < shape.padded; c += LANES) {
    Vec sums = {};
    for (int r = 0; r < rows; r++) sums += load(features + r * shape.padded + c) * (last ? last[r] : 1);
    store(total + c, load(total + c) + sums);
  }
}

// What the rows of a block see beyond it, for each of a few key heads: a state, and its last column apart.
struct Beyond {
  Shape shape;
  int heads;
  bool carried;         // from block to block
  bool any;             // whether there is anything
  const float* states;  // [heads][width][row]
  float* running;       // the same if it is carried
  float* totals;        // [heads][padded], the last column
  float* turned;        // [heads][width][turned], transposed states, or null

  static int64_t numbers(const Shape& shape, int heads) {
    return heads * (shape.size + shape.padded + shape.width * shape.turned + 48);
  }
  Beyond(const Shape& shape, int heads, bool carried, const float* slot, bool turns, Memory& memory)
      : shape(shape), heads(heads), carried(carried), any(slot), states(slot) {
    running = carried ? memory.take(heads * shape.size) : nullptr;
    totals = memory.take(heads * shape.padded);
    turned = turns ? memory.take(heads * shape.width * shape.turned) : nullptr;
    std::memset(totals, 0, size_t(heads * shape.padded) * sizeof(float));
    if (!any) {
      states = running;
      return;
    }
    for (int h = 0; h < heads; h++) {
      const float* last = states + h * shape.size + shape.width;
      for (int f = 0; f < shape.width; f++) totals[h * shape.padded + f] = last[f * shape.row];
      turn(h);
    }
    if (!carried) return;
    std::memcpy(running, states, size_t(heads * shape.size) * sizeof(float));
    states = running;
  }

  Right state(int head) const { return {states + head * shape.size, shape.row}; }
  Right turned_state(int head) const { return {turned + head * shape.width * shape.turned, shape.turned}; }
  const float* total(int head) const { return totals + head * shape.padded; }
  void turn(int head) const {
    if (!turned) return;
    float* to = turned + head * shape.width * shape.turned;
    transpose(shape.width, shape.width, state(head).data, shape.row, to, shape.turned);
  }
  // Adds rows, as `add_to_state` does, to the state that is carried. Whoever reads it transposed turns it afterwards.
  void add(int head, int rows, const float* features, const float* values, const float* last, Old old,
           Fetch<1>& fetch) const {
    float *state = running + head * shape.size, *total = totals + head * shape.padded;
    add_to_state(shape, rows, features, values, last, state, total, old, fetch);
  }
};

// Rows of a block that are seen one by one.
struct Own {
  int rows;
  Seen seen;
  const float* transposed;  // [width][BLOCK_ROWS], what rows are multiplied with
  const float* last;        // [BLOCK_ROWS], added to each product, or null
  Right partners;           // what the products weigh
};

// products[i][j] of row `first_row` + i and column `first` + j, 0 where the row does not see the column.
void mask_products(const Own& own, int first_row, int rows, int first, int columns, float* products) {
  for (int i = 0; i < rows; i++) {
    float* row = products + i * BLOCK_ROWS;
    const IntVec here = IntVec{} + (first_row + i);
    for (int c = 0; c < columns; c += LANES) {
      Vec x = load(row + c);
      if (own.last) x += load(own.last + first + c);
      const IntVec place = lane_numbers() + (first + c);
      if (own.seen == Seen::EARLIER) x = place <= here ? x : Vec{};
      if (own.seen == Seen::LATER) x = place >= here ? x : Vec{};
      store(row + c, x);
    }
  }
}

// out += (left . own^T + last, where seen) . partners
void add_own(const Shape& shape, const float* left, const Own& own, float* out, Old old) {
  alignas(64) float products[OWN_ROWS * BLOCK_ROWS];
  for (int r = 0; r < own.rows; r += OWN_ROWS) {
    const int rows = least(OWN_ROWS, own.rows - r);
    const int first = own.seen == Seen::LATER ? r / LANES * LANES : 0;
    const int stop = own.seen == Seen::EARLIER ? r + rows : own.rows, columns = int(round_up(stop - first, LANES));
    multiply(rows, columns, Left{left + r * shape.padded, shape.padded, 1}, Right{own.transposed + first, BLOCK_ROWS},
             shape.width, Result{products, BLOCK_ROWS});
    mask_products(own, r, rows, first, columns, products);
    const Right partners{own.partners.data + first * own.partners.row, own.partners.row};
    multiply(rows, int(shape.padded), Left{products, BLOCK_ROWS, 1}, partners, stop - first,
             Result{out + r * shape.padded, shape.padded}, old);
  }
}

// visit(row, z): z [padded] is the sum of the features that a row sees, beyond its block and among `own` of it (or null).
template <class Visit>
void for_normalisers(const Shape& shape, int rows, const float* beyond, const float* own, Seen seen, const Visit& visit) {
  alignas(64) float z[MOST_WIDTH];
  const auto add = [&](const float* row) {
    for (int64_t c = 0; c < shape.padded; c += LANES) store(z + c, load(z + c) + load(row + c));
  };
  std::memcpy(z, beyond, size_t(shape.padded) * sizeof(float));
  if (own && seen == Seen::ALL)
    for (int r = 0; r < rows; r++) add(own + r * shape.padded);
  for (int r = 0; r < rows; r++) {
    if (own && seen == Seen::EARLIER) add(own + r * shape.padded);
    visit(r, z);
  }
}

float dot(const float* a, const float* b, int64_t padded) {
  Vec total = {};
  for (int64_t c = 0; c < padded; c += LANES) total += load(a + c) * load(b + c);
  return sum(total);
}

// A tile and a block of heads: what a task works on.
struct Task {
  const LinearAttention& inputs;
  Shape shape;
  Tile tile;
  Heads keys, queries;
  int repeats;
  const float* slot;  // the states that the tile sees beyond itself [keys], or null
  int64_t state;      // where its own states begin among those of all parts
  bool own;           // whether rows are seen one by one
  Seen seen;

  Task(const LinearAttention& inputs, const Plan& plan, const HeadCut& cut, const float* states, int64_t number)
      : inputs(inputs),
        shape(inputs),
        tile(plan.tiles[number / cut.blocks()]),
        keys(cut.keys(number % cut.blocks())),
        queries(cut.queries(number % cut.blocks())),
        repeats(cut.repeats) {
    slot = tile.slot < 0 ? nullptr : states + (int64_t(tile.slot) * inputs.kv_heads + keys.first) * shape.size;
    state = (int64_t(tile.part) * inputs.kv_heads + keys.first) * shape.size;
    own = inputs.causal || !slot;
    seen = inputs.causal ? Seen::EARLIER : Seen::ALL;
  }
  int64_t block_numbers() const { return BLOCK_ROWS * shape.padded; }
  int rows(int64_t at) const { return int(least<int64_t>(BLOCK_ROWS, tile.end - at)); }
  float* head(float* blocks, int head) const { return blocks + head * block_numbers(); }
  // The rows of the block from `next` on, if it lies in the tile, are fetched.
  void fetch_queries(int64_t next, const Rows& rows, Fetch<1>& fetch) const { fetch_block(next, rows, queries, fetch); }
  void fetch_keys(int64_t next, const Rows& rows, Fetch<1>& fetch) const { fetch_block(next, rows, keys, fetch); }
  void fetch_own(int64_t next, Fetch<1>& fetch) const {
    if (!own) return;
    fetch_keys(next, inputs.k, fetch);
    fetch_keys(next, inputs.v, fetch);
  }
  void fetch_block(int64_t next, const Rows& rows, Heads heads, Fetch<1>& fetch) const {
    if (next < tile.begin) return;
    fetch_rows(inputs.dtype, rows, next, least<int64_t>(next + BLOCK_ROWS, tile.end), heads, shape.width, fetch);
  }
};

// Whether the rows of `heads` heads in all, a gradient or the output, are written past the cache.
bool past_cache(const LinearAttention& inputs, int64_t heads) {
  return passes_cache(1, inputs.tokens * heads * inputs.head_dim * int64_t(sizeof(float)));
}

void forward_tile(const LinearAttentionForward& problem, const Task& task) {
  const LinearAttention& in = task.inputs;
  const Shape& shape = task.shape;
  const int64_t block = task.block_numbers();
  const int heads = task.queries.count, keys = task.keys.count;
  Memory memory{scratch<0>(size_t(2 * (heads + keys) * block + (shape.width + heads) * BLOCK_ROWS +
                                  Beyond::numbers(shape, keys)))};
  float *q = memory.take(heads * block), *out = memory.take(heads * block), *inverses = memory.take(heads * BLOCK_ROWS);
  float *k = memory.take(keys * block), *v = memory.take(keys * block), *turned = memory.take(shape.width * BLOCK_ROWS);
  Beyond beyond(shape, keys, in.causal, task.slot, false, memory);
  for (int64_t at = task.tile.begin; at < task.tile.end; at += BLOCK_ROWS) {
    const int rows = task.rows(at);
    load_features(in.dtype, in.map, in.q, at, rows, task.queries, shape.width, q);
    if (task.own) {
      load_features(in.dtype, in.map, in.k, at, rows, task.keys, shape.width, k, SCALE);
      load_values(in.dtype, in.v, at, rows, task.keys, shape.width, v);
    }
    Fetch<1> fetch;
    task.fetch_queries(at + rows, in.q, fetch);
    task.fetch_own(at + rows, fetch);
    for (int h = 0; h < heads; h++) {
      const int key = h / task.repeats;
      const float *own_q = task.head(q, h), *own_k = task.head(k, key);
      float* own_out = task.head(out, h);
      if (beyond.any)
        multiply(rows, int(shape.padded), Left{own_q, shape.padded, 1}, beyond.state(key), shape.width,
                 Result{own_out, shape.padded}, Old::CLEAR, nullptr, fetch);
      if (task.own) {
        if (h % task.repeats == 0) transpose(rows, shape.width, own_k, shape.padded, turned, BLOCK_ROWS);
        const Own own{rows, task.seen, turned, nullptr, Right{task.head(v, key), shape.padded}};
        add_own(shape, own_q, own, own_out, beyond.any ? Old::KEEP : Old::CLEAR);
      }
      const auto normalise = [&](int r, const float* z) {
        const float total = dot(own_q + r * shape.padded, z, shape.padded), inverse = total < LEAST ? 0 : 1 / total;
        inverses[h * BLOCK_ROWS + r] = problem.inverse[(at + r) * in.heads + task.queries.first + h] = inverse;
      };
      for_normalisers(shape, rows, beyond.total(key), task.own ? own_k : nullptr, task.seen, normalise);
    }
    store_values(in.dtype, out, at, rows, task.queries, shape.width, problem.out, inverses,
                 past_cache(in, in.heads));
    if (!in.causal || at + rows == task.tile.end) continue;
    for (int h = 0; h < keys; h++)
      beyond.add(h, rows, task.head(k, h), task.head(v, h), nullptr, beyond.any ? Old::KEEP : Old::CLEAR, fetch);
    beyond.any = true;
  }
  finish_streams();
}

// dq of a tile, -do.o of its rows, and where other tiles need it the state of its gradients, dS.
void queries_backward(const LinearAttentionBackward& problem, const Task& task, float* last, float* parts) {
  const LinearAttention& in = task.inputs;
  const Shape& shape = task.shape;
  const int64_t block = task.block_numbers();
  const int heads = task.queries.count, keys = task.keys.count;
  Memory memory{scratch<0>(
      size_t((3 * heads + 2 * keys) * block + shape.width * BLOCK_ROWS + keys * shape.padded + 16 +
             Beyond::numbers(shape, keys)))};
  float *q = memory.take(heads * block), *d_out = memory.take(heads * block), *dq = memory.take(heads * block);
  float *k = memory.take(keys * block), *v = memory.take(keys * block), *turned = memory.take(shape.width * BLOCK_ROWS);
  float* totals = memory.take(keys * shape.padded);  // of dS
  std::memset(totals, 0, size_t(keys * shape.padded) * sizeof(float));
  Beyond beyond(shape, keys, in.causal, task.slot, true, memory);
  for (int64_t at = task.tile.begin; at < task.tile.end; at += BLOCK_ROWS) {
    const int rows = task.rows(at);
    load_features(in.dtype, in.map, in.q, at, rows, task.queries, shape.width, q);
    load_values(in.dtype, problem.d_out, at, rows, task.queries, shape.width, d_out);
    if (task.own) {
      load_features(in.dtype, in.map, in.k, at, rows, task.keys, shape.width, k, SCALE);
      load_values(in.dtype, in.v, at, rows, task.keys, shape.width, v);
    }
    Fetch<1> fetch;
    task.fetch_queries(at + rows, in.q, fetch);
    task.fetch_queries(at + rows, problem.d_out, fetch);
    task.fetch_own(at + rows, fetch);
    for (int h = 0; h < heads; h++) {
      const int key = h / task.repeats;
      const float *own_d_out = task.head(d_out, h), *own_k = task.head(k, key);
      float *own_q = task.head(q, h), *own_dq = task.head(dq, h);
      if (beyond.any)
        multiply(rows, int(shape.padded), Left{own_d_out, shape.padded, 1}, beyond.turned_state(key), shape.width,
                 Result{own_dq, shape.padded}, Old::CLEAR, nullptr, fetch);
      if (task.own) {
        if (h % task.repeats == 0) transpose(rows, shape.width, task.head(v, key), shape.padded, turned, BLOCK_ROWS);
        const Own own{rows, task.seen, turned, nullptr, Right{own_k, shape.padded}};
        add_own(shape, own_d_out, own, own_dq, beyond.any ? Old::KEEP : Old::CLEAR);
      }
      alignas(64) float own_last[BLOCK_ROWS];
      const auto finish = [&](int r, const float* z) {
        float* features = own_q + r * shape.padded;
        float* row = own_dq + r * shape.padded;
        const int64_t place = (at + r) * in.heads + task.queries.first + h;
        const float inverse = problem.inverse[place], delta = dot(features, row, shape.padded) * inverse;
        for (int64_t c = 0; c < shape.padded; c += LANES) store(row + c, load(row + c) - load(z + c) * delta);
        feature_row_backward(in.map, features, row, shape.width, row);
        scale_row(row, shape.padded, inverse);  // at last: where Z is tiny, 1 / Z times a gradient of phi is infinite
        last[place] = own_last[r] = -delta;
        if (task.slot) scale_row(features, shape.padded, inverse);
      };
      for_normalisers(shape, rows, beyond.total(key), task.own ? own_k : nullptr, task.seen, finish);
      if (task.slot)
        add_to_state(shape, rows, own_q, own_d_out, own_last, parts + task.state + key * shape.size,
                     totals + key * shape.padded, at == task.tile.begin && h % task.repeats == 0 ? Old::CLEAR : Old::KEEP,
                     fetch);
    }
    store_values(in.dtype, dq, at, rows, task.queries, shape.width, problem.dq, nullptr, past_cache(in, in.heads));
    if (!in.causal || at + rows == task.tile.end) continue;
    for (int h = 0; h < keys; h++) {
      beyond.add(h, rows, task.head(k, h), task.head(v, h), nullptr, beyond.any ? Old::KEEP : Old::CLEAR, fetch);
      beyond.turn(h);
    }
    beyond.any = true;
  }
  finish_streams();
  for (int h = 0; task.slot && h < keys; h++)
    finish_state(shape.width, shape.width, totals + h * shape.padded, parts + task.state + h * shape.size);
}

// dk and dv of a tile.
void keys_backward(const LinearAttentionBackward& problem, const Task& task, const float* last) {
  const LinearAttention& in = task.inputs;
  const Shape& shape = task.shape;
  const int64_t block = task.block_numbers();
  const int heads = task.queries.count, keys = task.keys.count;
  Memory memory{scratch<0>(size_t((2 * heads + 4 * keys) * block + 2 * shape.width * BLOCK_ROWS + heads * BLOCK_ROWS +
                                  Beyond::numbers(shape, keys)))};
  float *k = memory.take(keys * block), *v = memory.take(keys * block);
  float *dk = memory.take(keys * block), *dv = memory.take(keys * block);
  float *q = memory.take(heads * block), *d_out = memory.take(heads * block), *lasts = memory.take(heads * BLOCK_ROWS);
  float *turned_q = memory.take(shape.width * BLOCK_ROWS), *turned_d_out = memory.take(shape.width * BLOCK_ROWS);
  Beyond beyond(shape, keys, in.causal, task.slot, true, memory);
  const Seen seen = in.causal ? Seen::LATER : Seen::ALL;
  const int64_t blocks = (task.tile.end - task.tile.begin + BLOCK_ROWS - 1) / BLOCK_ROWS;
  for (int64_t i = 0; i < blocks; i++) {  // a carried state comes from the end
    const int64_t at = task.tile.begin + (blocks - 1 - i) * BLOCK_ROWS;
    const int rows = task.rows(at);
    load_features(in.dtype, in.map, in.k, at, rows, task.keys, shape.width, k);
    load_values(in.dtype, in.v, at, rows, task.keys, shape.width, v);
    if (task.own) {
      load_features(in.dtype, in.map, in.q, at, rows, task.queries, shape.width, q, 1, problem.inverse, in.heads);
      load_values(in.dtype, problem.d_out, at, rows, task.queries, shape.width, d_out);
      for (int h = 0; h < heads; h++)
        for (int r = 0; r < BLOCK_ROWS; r++)
          lasts[h * BLOCK_ROWS + r] = r < rows ? last[(at + r) * in.heads + task.queries.first + h] : 0;
    }
    Fetch<1> fetch;
    const int64_t next = at - BLOCK_ROWS;
    task.fetch_keys(next, in.k, fetch);
    task.fetch_keys(next, in.v, fetch);
    if (task.own) {
      task.fetch_queries(next, in.q, fetch);
      task.fetch_queries(next, problem.d_out, fetch);
    }
    for (int key = 0; key < keys; key++) {
      const float *own_k = task.head(k, key), *own_v = task.head(v, key);
      float *own_dk = task.head(dk, key), *own_dv = task.head(dv, key);
      if (beyond.any) {
        multiply(rows, int(shape.padded), Left{own_k, shape.padded, 1}, beyond.state(key), shape.width,
                 Result{own_dv, shape.padded}, Old::CLEAR, nullptr, fetch);
        multiply(rows, int(shape.padded), Left{own_v, shape.padded, 1}, beyond.turned_state(key), shape.width,
                 Result{own_dk, shape.padded}, Old::CLEAR, nullptr, fetch);
        for (int r = 0; r < rows; r++)
          for (int64_t c = 0; c < shape.padded; c += LANES)
            store(own_dk + r * shape.padded + c, load(own_dk + r * shape.padded + c) + load(beyond.total(key) + c));
      }
      for (int h = key * task.repeats; task.own && h < (key + 1) * task.repeats; h++) {
        const float *own_q = task.head(q, h), *own_d_out = task.head(d_out, h), *own_last = lasts + h * BLOCK_ROWS;
        const Old old = beyond.any || h % task.repeats ? Old::KEEP : Old::CLEAR;
        transpose(rows, shape.width, own_q, shape.padded, turned_q, BLOCK_ROWS);
        transpose(rows, shape.width, own_d_out, shape.padded, turned_d_out, BLOCK_ROWS);
        add_own(shape, own_k, Own{rows, seen, turned_q, nullptr, Right{own_d_out, shape.padded}}, own_dv, old);
        add_own(shape, own_v, Own{rows, seen, turned_d_out, own_last, Right{own_q, shape.padded}}, own_dk, old);
      }
      for (int r = 0; r < rows; r++) {
        float* row = own_dk + r * shape.padded;
        feature_row_backward(in.map, own_k + r * shape.padded, row, shape.width, row);
        scale_row(row, shape.padded, SCALE);
        scale_row(own_dv + r * shape.padded, shape.padded, SCALE);
      }
    }
    store_values(in.dtype, dk, at, rows, task.keys, shape.width, problem.dk, nullptr, past_cache(in, in.kv_heads));
    store_values(in.dtype, dv, at, rows, task.keys, shape.width, problem.dv, nullptr, past_cache(in, in.kv_heads));
    if (!in.causal || at == task.tile.begin) continue;
    for (int h = 0; h < heads; h++) {
      const Old old = beyond.any || h % task.repeats ? Old::KEEP : Old::CLEAR;
      beyond.add(h / task.repeats, rows, task.head(q, h), task.head(d_out, h), lasts + h * BLOCK_ROWS, old, fetch);
      if (h % task.repeats == task.repeats - 1) beyond.turn(h / task.repeats);
    }
    beyond.any = true;
  }
  finish_streams();
}

float* new_states(const LinearAttention& inputs, const Plan& plan) {
  return scratch<4>(size_t(plan.num_parts * inputs.kv_heads * Shape(inputs).size));
}

// What the tiles see beyond themselves, given the states of all parts: sums over segments, or if causal over the earlier
// (or later) tiles of them.
const float* sums_of(const LinearAttention& inputs, const Plan& plan, const float* states, bool later,
                     const Parallel& parallel) {
  const int64_t size = inputs.kv_heads * Shape(inputs).size;
  float* sums = scratch<5>(size_t((inputs.causal ? plan.num_parts : plan.num_segments) * size));
  if (inputs.causal) {
    int32_t* numbers = reinterpret_cast<int32_t*>(scratch<7>(size_t(plan.num_parts + 1)));
    for (int64_t i = 0; i <= plan.num_parts; i++) numbers[i] = int32_t(i);
    const int32_t *before = later ? nullptr : numbers, *after = later ? numbers + 1 : nullptr;
    far_states({states, size, plan.num_segments, plan.bounds, before, after, sums}, parallel);
  } else {
    segment_states({states, size, plan.num_segments, plan.bounds, sums}, parallel);
  }
  return sums;
}

const float* key_states(const LinearAttention& in, const Plan& plan, const Parallel& parallel) {
  GroupStates rows = {};
  rows.dtype = in.dtype;
  rows.map = in.map;
  rows.features = in.k;
  rows.values = in.v;
  rows.heads = rows.kv_heads = in.kv_heads;
  rows.width = rows.head_dim = in.head_dim;
  rows.scale = SCALE;
  rows.groups = plan.num_parts;
  rows.begins = plan.begins;
  rows.ends = plan.ends;
  rows.states = new_states(in, plan);
  group_states(rows, parallel);
  return sums_of(in, plan, rows.states, false, parallel);
}

void clear_slack(const LinearAttention& inputs, int heads, const MutableRows& rows) {
  with_type(inputs.dtype, [&](auto zero) {
    for (int64_t i = inputs.bounds[inputs.segments]; i < inputs.tokens; i++)
      for (int h = 0; h < heads; h++)
        std::memset(rows.at<decltype(zero)>(i, h), 0, size_t(inputs.head_dim) * sizeof(zero));
  });
}

}  // namespace

void linear_attention_forward(const LinearAttentionForward& problem, const Parallel& parallel) {
  const LinearAttention& in = problem.inputs;
  const Plan plan = make_plan(in);
  const HeadCut cut(in.heads, in.kv_heads, in.head_dim);
  const float* states = key_states(in, plan, parallel);
  parallel(plan.num_tiles * cut.blocks(),
           [&](int64_t number) { forward_tile(problem, Task(in, plan, cut, states, number)); });
  clear_slack(in, in.heads, problem.out);
  for (int64_t i = int64_t(in.bounds[in.segments]) * in.heads; i < in.tokens * in.heads; i++) problem.inverse[i] = 0;
}

void linear_attention_backward(const LinearAttentionBackward& problem, const Parallel& parallel) {
  const LinearAttention& in = problem.inputs;
  const Plan plan = make_plan(in);
  const HeadCut cut(in.heads, in.kv_heads, in.head_dim);
  float* last = scratch<6>(size_t(in.tokens * in.heads));
  const int64_t tasks = plan.num_tiles * cut.blocks();
  const float* states = key_states(in, plan, parallel);
  float* parts = new_states(in, plan);
  parallel(tasks, [&](int64_t i) { queries_backward(problem, Task(in, plan, cut, states, i), last, parts); });
  states = sums_of(in, plan, parts, true, parallel);
  parallel(tasks, [&](int64_t i) { keys_backward(problem, Task(in, plan, cut, states, i), last); });
  clear_slack(in, in.heads, problem.dq);
  clear_slack(in, in.kv_heads, problem.dk);
  clear_slack(in, in.kv_heads, problem.dv);
}

}  // namespace VOT_ISA
}  // namespace vot
