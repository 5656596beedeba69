// Blocked softmax attention over tiles, with the log-sum-exp (FlashAttention, arXiv 2205.14135 and 2307.08691), on CPUs: a
// panel of PANEL queries goes over the keys that it sees, KEYS at a time. Sums are fp32 whatever the tensors are.

constexpr I64 KEYS = 64, QUERIES = 8 * 12;  // both are whole vectors, and QUERIES whole panels
constexpr I64 BACK = 48;                    // queries of a step of the backward pass

struct Sight {  // keys that query `row` of the tensor sees in a tile
  const Tile& tile;
  __attribute__((always_inline)) I64 first(I64 row) const {
    const I64 at = tile.k_begin + tile.shift + (row - tile.q_begin) - tile.high + 1;
    return at > tile.k_begin ? at : tile.k_begin;
  }
  __attribute__((always_inline)) I64 end(I64 row) const {
    const I64 at = tile.k_begin + tile.shift + (row - tile.q_begin) - tile.low + 1;
    return at < tile.k_end ? at : tile.k_end;
  }
};

template <typename T>
KERNEL void widen_row(const T* x, float* to, I64 size, float scale) {
  for (I64 i = 0; i < size; i += WIDTH) store(to + i, load_some(x + i, size - i) * scale);
}
KERNEL void widen_row(const Strided& x, I64 b, I64 t, I64 h, float* to, I64 size, float scale) {
  const I64 at = b * x.batch + t * x.token + h * x.head;
  if (x.half) return widen_row(reinterpret_cast<const Half*>(x.data) + at, to, size, scale);
  widen_row(reinterpret_cast<const float*>(x.data) + at, to, size, scale);
}

// `rows` of KEYS tokens [KEYS, ld] as [size, KEYS].
KERNEL void transpose_block(const float* rows, I64 ld, float* to, I64 size) {
  for (I64 i = 0; i < KEYS; i += WIDTH)
    for (I64 j = 0; j < size; j += WIDTH) {
      Vec square[WIDTH];
#pragma GCC unroll 16
      for (I64 n = 0; n < WIDTH; ++n) square[n] = load(rows + (i + n) * ld + j);
      transpose(square);
      for (I64 n = 0; n < WIDTH && j + n < size; ++n) store(to + (j + n) * KEYS + i, square[n]);
    }
}

KERNEL void widen_block(const Strided& x, I64 b, I64 first, I64 end, I64 head, float* to, I64 size) {
  const I64 ld = up(size, WIDTH);
  for (I64 i = 0; i < KEYS; ++i) {
    if (first + i < end)
      widen_row(x, b, first + i, head, to + i * ld, size, 1.0f);
    else
      __builtin_memset(to + i * ld, 0, ld * sizeof(float));
  }
}

// Items: blocks of KEYS keys of each kv head of each row. The backward pass needs rows of keys too, and values only
// transposed.
static void pack_keys(const Attention& a, bool backward, I64 begin, I64 end) {
  const I64 blocks = up(a.k_tokens, KEYS) / KEYS, size = up(a.size, WIDTH), value = up(a.value_size, WIDTH);
  float* scratch = scratch_of(KEYS * most(size, value));
  for (I64 item = begin; item < end; ++item) {
    const I64 first = item % blocks * KEYS, head = item / blocks % a.kv_heads, b = item / blocks / a.kv_heads;
    float* rows = backward ? a.keys + item * KEYS * size : scratch;
    widen_block(a.k, b, first, a.k_tokens, head, rows, a.size);
    transpose_block(rows, size, a.keys_t + item * KEYS * a.size, a.size);
    rows = backward ? scratch : a.values + item * KEYS * value;
    widen_block(a.v, b, first, a.k_tokens, head, rows, a.value_size);
    if (backward) transpose_block(rows, value, a.values_t + item * KEYS * a.value_size, a.value_size);
  }
}

// Items: heads of rows. Scaled queries, gradients of the output, and the products of these with the output.
static void pack_queries(const Attention& a, I64 begin, I64 end) {
  const I64 size = up(a.size, WIDTH), value = up(a.value_size, WIDTH);
  float row[4096 + WIDTH];
  for (I64 item = begin; item < end; ++item) {
    const I64 head = item % a.heads, b = item / a.heads;
    for (I64 t = 0; t < a.q_tokens; ++t) {
      const I64 at = item * a.q_tokens + t;
      widen_row(a.q, b, t, head, a.queries + at * size, a.size, a.scale);
      float* grad = a.grads + at * value;
      widen_row(a.grad, b, t, head, grad, a.value_size, 1.0f);
      widen_row(a.out, b, t, head, row, a.value_size, 1.0f);
      Vec total = {};
      for (I64 i = 0; i < value; i += WIDTH) total += load(row + i) * load(grad + i);
      a.deltas[at] = sum(total);
    }
  }
}

// One panel of queries of one head: its softmax so far, which stands in `out` and `lse`, goes on over the keys of a tile.
static void forward_panel(const Attention& a, const Tile& tile, I64 b, I64 head, I64 from, I64 to, float* scratch) {
  const I64 size = up(a.size, WIDTH), value = up(a.value_size, WIDTH), rows = to - from;
  const I64 blocks = up(a.k_tokens, KEYS) / KEYS, kv_head = head / (a.heads / a.kv_heads);
  float *q = scratch, *total = q + PANEL * size, *scores = total + PANEL * value;
  Vec sums[PANEL];
  float tops[PANEL];
  float* out = reinterpret_cast<float*>(a.out.data);
  for (I64 i = 0; i < rows; ++i) {
    widen_row(a.q, b, from + i, head, q + i * size, a.size, a.scale);
    tops[i] = a.lse[(b * a.q_tokens + from + i) * a.heads + head];
    sums[i] = Vec{};
    const float* before = out + ((b * a.q_tokens + from + i) * a.heads + head) * a.value_size;
    const bool seen = tops[i] != -kInfinity;  // a NaN stays one
    sums[i][0] = seen ? 1.0f : 0.0f;
    for (I64 j = 0; j < value; j += WIDTH)
      store(total + i * value + j, seen ? load_some(before + j, a.value_size - j) : Vec{});
  }
  const Sight sight{tile};
  const I64 first = sight.first(from), end = sight.end(to - 1);
  const IVec lanes = counting();
  for (I64 block = first / KEYS; block * KEYS < end; ++block) {
    const I64 begin = block * KEYS, c0 = most(first - begin, 0) / WIDTH * WIDTH, c1 = up(least(end - begin, KEYS), WIDTH);
    const I64 at = (b * a.kv_heads + kv_head) * blocks + block;
    multiply<false>(rows, c1 - c0, a.size, q, size, 1, a.keys_t + at * KEYS * a.size + c0, KEYS, scores + c0, KEYS);
    for (I64 i = 0; i < rows; ++i) {
      float* score = scores + i * KEYS;
      const int low = static_cast<int>(sight.first(from + i) - begin), high = static_cast<int>(sight.end(from + i) - begin);
      if (low >= high || high <= c0 || low >= c1) {  // nothing is seen
        for (I64 j = c0; j < c1; j += WIDTH) store(score + j, Vec{});
        continue;
      }
      if (low > c0 || high < c1) {
        for (I64 j = c0; j < c1; j += WIDTH) {
          const IVec place = lanes + static_cast<int>(j);
          store(score + j, pick((place >= low) & (place < high), load(score + j), all(-kInfinity)));
        }
      }
      Vec best = all(-kInfinity);
      for (I64 j = c0; j < c1; j += WIDTH) best = larger(best, load(score + j));
      const float top = largest(best) > tops[i] ? largest(best) : tops[i];
      if (top > tops[i]) {
        const Vec less = exponential(all(tops[i] - top));  // of -inf: 0
        sums[i] *= less;
        for (I64 j = 0; j < value; j += WIDTH) store(total + i * value + j, load(total + i * value + j) * less);
        tops[i] = top;
      }
      for (I64 j = c0; j < c1; j += WIDTH) {
        const Vec share = exponential(load(score + j) - top);
        sums[i] += share;
        store(score + j, share);
      }
    }
    multiply<true>(rows, value, c1 - c0, scores + c0, KEYS, 1, a.values + (at * KEYS + c0) * value, value, total, value);
  }
  for (I64 i = 0; i < rows; ++i) {
    const float whole = sum(sums[i]);
    if (whole == 0) continue;  // not of a NaN, which goes on
    const I64 at = (b * a.q_tokens + from + i) * a.heads + head;
    a.lse[at] = tops[i] + __builtin_logf(whole);
    for (I64 j = 0; j < a.value_size; j += WIDTH)
      store_some(out + at * a.value_size + j, load(total + i * value + j) * (1.0f / whole), a.value_size - j);
  }
}

// Items: QUERIES queries of a head of a row; all tiles that have some of these, in their order.
static void attention_forward(const Attention& a, I64 begin, I64 end) {
  const I64 size = up(a.size, WIDTH), value = up(a.value_size, WIDTH), parts = up(a.q_tokens, QUERIES) / QUERIES;
  float* scratch = static_cast<float*>(scratch_of(PANEL * (size + value + KEYS)));
  for (I64 item = begin; item < end; ++item) {
    const I64 part = item % parts, head = item / parts % a.heads, b = item / parts / a.heads;
    for (I64 n = 0; n < a.num_tiles; ++n) {
      const Tile& tile = a.tiles[n];
      const I64 from = most(tile.q_begin, part * QUERIES), to = least(tile.q_end, (part + 1) * QUERIES);
      for (I64 row = from; row < to; row += PANEL) forward_panel(a, tile, b, head, row, least(row + PANEL, to), scratch);
    }
  }
}

struct Step {  // BACK queries of one head against one block of keys
  I64 b, head, from, to, block;
};

// The softmax and the gradient of the scores of a step, [BACK, KEYS] each; 0 where nothing is seen. Adds to grad_q.
static void backward_scores(const Attention& a, const Tile& tile, const Step& at, I64 c0, I64 c1, float* scratch,
                            float* weights, float* inner, float* grad_q) {
  const I64 size = up(a.size, WIDTH), value = up(a.value_size, WIDTH), blocks = up(a.k_tokens, KEYS) / KEYS;
  const I64 kv = ((at.b * a.kv_heads) + at.head / (a.heads / a.kv_heads)) * blocks + at.block, begin = at.block * KEYS;
  const I64 row0 = (at.b * a.heads + at.head) * a.q_tokens;
  const Sight sight{tile};
  const IVec lanes = counting();
  for (I64 row = at.from; row < at.to; row += PANEL) {
    const I64 end = least(row + PANEL, at.to), rows = end - row;
    const I64 p0 = most(most(sight.first(row) - begin, 0) / WIDTH * WIDTH, c0);
    const I64 p1 = least(up(most(sight.end(end - 1) - begin, 0), WIDTH), c1);
    float *weight = weights + (row - at.from) * KEYS, *slope = inner + (row - at.from) * KEYS;
    for (I64 i = 0; i < rows; ++i)
      for (I64 j = c0; j < c1; j += WIDTH)
        if (j < p0 || j >= p1) {
          store(weight + i * KEYS + j, Vec{});
          store(slope + i * KEYS + j, Vec{});
        }
    if (p0 >= p1) continue;
    multiply<false>(rows, p1 - p0, a.size, a.queries + (row0 + row) * size, size, 1, a.keys_t + kv * KEYS * a.size + p0, KEYS,
                    weight + p0, KEYS);
    multiply<false>(rows, p1 - p0, a.value_size, a.grads + (row0 + row) * value, value, 1,
                    a.values_t + kv * KEYS * a.value_size + p0, KEYS, slope + p0, KEYS);
    for (I64 i = 0; i < rows; ++i) {
      const float lse = a.lse[(at.b * a.q_tokens + row + i) * a.heads + at.head], delta = a.deltas[row0 + row + i];
      const int low = static_cast<int>(sight.first(row + i) - begin), high = static_cast<int>(sight.end(row + i) - begin);
      const bool whole = low <= p0 && high >= p1;
      for (I64 j = p0; j < p1; j += WIDTH) {
        Vec share = exponential(load(weight + i * KEYS + j) - lse);
        if (!whole) {
          const IVec place = lanes + static_cast<int>(j);
          share = pick((place >= low) & (place < high), share, Vec{});
        }
        store(weight + i * KEYS + j, share);
        store(slope + i * KEYS + j, share * (load(slope + i * KEYS + j) - delta));
      }
    }
    multiply<false>(rows, size, p1 - p0, slope + p0, KEYS, 1, a.keys + (kv * KEYS + p0) * size, size, scratch, size);
    for (I64 i = 0; i < rows; ++i) {
      float* to = grad_q + ((at.b * a.q_tokens + row + i) * a.heads + at.head) * a.size;
      for (I64 j = 0; j < a.size; j += WIDTH)
        store_some(to + j, load_some(to + j, a.size - j) + load(scratch + i * size + j) * a.scale, a.size - j);
    }
  }
}

KERNEL void add_rows(float* to, I64 stride, const float* from, I64 ld, I64 rows, I64 size) {
  for (I64 i = 0; i < rows; ++i)
    for (I64 j = 0; j < size; j += WIDTH)
      store_some(to + i * stride + j, load_some(to + i * stride + j, size - j) + load(from + i * ld + j), size - j);
}

// A block of keys of one kv head: all queries of the tile that see some of it.
static void backward_block(const Attention& a, const Tile& tile, I64 b, I64 kv_head, I64 block, float* grad_q, float* scratch) {
  const I64 size = up(a.size, WIDTH), value = up(a.value_size, WIDTH), group = a.heads / a.kv_heads, begin = block * KEYS;
  const I64 c0 = most(tile.k_begin - begin, 0) / WIDTH * WIDTH, c1 = up(least(tile.k_end - begin, KEYS), WIDTH);
  float *weights = scratch + PANEL * size, *inner = weights + BACK * KEYS, *grad_k = inner + BACK * KEYS;
  float* grad_v = grad_k + KEYS * size;
  __builtin_memset(grad_k, 0, sizeof(float) * KEYS * (size + value));
  const Sight sight{tile};
  for (I64 head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    const I64 row0 = (b * a.heads + head) * a.q_tokens;
    for (I64 from = tile.q_begin; from < tile.q_end; from += BACK) {
      const I64 to = least(from + BACK, tile.q_end);
      if (sight.end(to - 1) <= most(begin, tile.k_begin) || sight.first(from) >= least(begin + KEYS, tile.k_end)) continue;
      backward_scores(a, tile, Step{b, head, from, to, block}, c0, c1, scratch, weights, inner, grad_q);
      for (I64 key = c0; key < c1; key += PANEL) {
        const I64 keys = least(PANEL, c1 - key);
        I64 low = from, high = to;  // queries that see some of these keys
        while (low < high && sight.end(low) <= begin + key) ++low;
        while (high > low && sight.first(high - 1) >= begin + key + keys) --high;
        if (low >= high) continue;
        const I64 at = (low - from) * KEYS + key;
        multiply<true>(keys, value, high - low, weights + at, 1, KEYS, a.grads + (row0 + low) * value, value,
                       grad_v + key * value, value);
        multiply<true>(keys, size, high - low, inner + at, 1, KEYS, a.queries + (row0 + low) * size, size,
                       grad_k + key * size, size);
      }
    }
  }
  const I64 first = most(tile.k_begin - begin, 0), rows = least(tile.k_end - begin, KEYS) - first;
  const I64 to = (b * a.k_tokens + begin + first) * a.kv_heads + kv_head;
  add_rows(a.grad_k + to * a.size, a.kv_heads * a.size, grad_k + first * size, size, rows, a.size);
  add_rows(a.grad_v + to * a.value_size, a.kv_heads * a.value_size, grad_v + first * value, value, rows, a.value_size);
}

// Items: (chunk of the blocks of keys, row, kv head). A chunk sums up grad_q by itself.
static void attention_backward(const Attention& a, I64 begin, I64 end) {
  const I64 size = up(a.size, WIDTH), value = up(a.value_size, WIDTH), blocks = up(a.k_tokens, KEYS) / KEYS;
  float* scratch = static_cast<float*>(scratch_of(PANEL * size + 2 * BACK * KEYS + KEYS * (size + value)));
  for (I64 item = begin; item < end; ++item) {
    const I64 head = item % a.kv_heads, b = item / a.kv_heads % a.batch, chunk = item / a.kv_heads / a.batch;
    const I64 first = chunk * blocks / a.chunks, last = (chunk + 1) * blocks / a.chunks;
    float* grad_q = chunk ? a.sums_q + (chunk - 1) * a.batch * a.q_tokens * a.heads * a.size : a.grad_q;
    for (I64 n = 0; n < a.num_tiles; ++n) {
      const Tile& tile = a.tiles[n];
      const I64 block0 = most(first, tile.k_begin / KEYS), block1 = least(last, up(tile.k_end, KEYS) / KEYS);
      for (I64 block = block0; block < block1; ++block) backward_block(a, tile, b, head, block, grad_q, scratch);
    }
  }
}
