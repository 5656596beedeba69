// Attention of one query a sequence to the blocks of a paged cache. A thread block takes up to kGroup heads that share
// keys, and one of `splits` stretches of a sequence; a group of lanes takes one position at a time and keeps a softmax
// of its own; they are merged in shared memory, and the splits by a second kernel (arXiv 2205.14135; flash-decoding).
#include "launch.hpp"
#include "types.cuh"

namespace {

constexpr int kThreads = 128, kGroup = 4, kPage = 16;  // kPage: BLOCK of megallm/inference/blocks.py

struct Shape {
  I64 positions, width, window;
  int heads, kv_heads, size, splits, lanes;
  float cap, scale;
};

// Largest score, sum of exp(score - largest), and that sum of values.
struct Weight {
  float top, total;
};

// What a sum counts whose largest term was `top` when the largest of all is `all`.
DEVICE float share(float top, float all) { return top == -INFINITY ? 0.0f : __expf(top - all); }

template <typename T, int V, int ITEMS>
__global__ void __launch_bounds__(kThreads) attend(const T* q, const T* keys, const T* values, const I64* table, const I64* lengths, float* parts, Shape at) {
  constexpr int N = V * ITEMS;
  SHARED(float, sums, kThreads * N * kGroup);
  SHARED(Weight, weights, kThreads * kGroup);
  const int group = at.heads / at.kv_heads, chunks = (group + kGroup - 1) / kGroup, kv = blockIdx.y / chunks;
  const int first = kv * group + blockIdx.y % chunks * kGroup;
  const int heads = (kv + 1) * group - first < kGroup ? (kv + 1) * group - first : kGroup;
  const int lane = threadIdx.x % at.lanes, stream = threadIdx.x / at.lanes, streams = kThreads / at.lanes;
  const I64 row = blockIdx.x, length = lengths[row];
  const I64 oldest = at.window > 0 && length > at.window ? length - at.window : 0;
  const I64 count = (length - oldest + at.splits - 1) / at.splits, begin = oldest + blockIdx.z * count;
  const I64 end = begin + count < length ? begin + count : length;
  // Feature j of item i is i lanes V + lane V + j.
  const auto feature = [&](int i) { return (i * at.lanes + lane) * V; };
  float own[kGroup][N], acc[kGroup][N] = {};
  Weight state[kGroup];
#pragma unroll
  for (int h = 0; h < kGroup; ++h) {
    state[h] = {-INFINITY, 0.0f};
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int j = feature(i / V) + i % V;
      own[h][i] = h < heads && j < at.size ? wide(q[(row * at.heads + first + h) * at.size + j]) * at.scale : 0.0f;
    }
  }
  for (I64 base = begin; base < end; base += streams) {  // the same rounds for all lanes of a warp
    const I64 position = base + stream < end ? base + stream : end - 1;
    const I64 place = table[row * at.width + position / kPage] * kPage + position % kPage;
    const I64 from = (kv * at.positions + place) * at.size;
    Pack<T, V> key[ITEMS], value[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      const bool here = feature(i) < at.size;
      key[i] = here ? load<V>(keys + from + feature(i)) : Pack<T, V>{};
      value[i] = here ? load<V>(values + from + feature(i)) : Pack<T, V>{};
    }
#pragma unroll
    for (int h = 0; h < kGroup; ++h) {
      if (h >= heads) break;
      float score = 0;
#pragma unroll
      for (int i = 0; i < N; ++i) score += own[h][i] * wide(key[i / V].x[i % V]);
      score = warp_sum(score, at.lanes);
      if (at.cap > 0) score = at.cap * tanhf(score / at.cap);
      if (base + stream >= end) continue;
      const float top = fmaxf(state[h].top, score), kept = share(state[h].top, top), added = __expf(score - top);
      state[h] = {top, state[h].total * kept + added};
#pragma unroll
      for (int i = 0; i < N; ++i) acc[h][i] = acc[h][i] * kept + added * wide(value[i / V].x[i % V]);
    }
  }
  for (int h = 0; h < heads; ++h) {
    if (lane == 0) weights[stream * kGroup + h] = state[h];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int j = feature(i / V) + i % V;
      if (j < at.size) sums[(stream * kGroup + h) * at.lanes * N + j] = acc[h][i];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < heads * at.size; i += kThreads) {
    const int h = i / at.size, j = i % at.size;
    float top = -INFINITY, total = 0, sum = 0;
    for (int s = 0; s < streams; ++s) top = fmaxf(top, weights[s * kGroup + h].top);
    for (int s = 0; s < streams; ++s) {
      const float kept = share(weights[s * kGroup + h].top, top);
      total += weights[s * kGroup + h].total * kept;
      sum += sums[(s * kGroup + h) * at.lanes * N + j] * kept;
    }
    float* to = parts + ((row * at.heads + first + h) * at.splits + blockIdx.z) * (at.size + 2);
    to[2 + j] = sum;
    if (j == 0) to[0] = top, to[1] = total;
  }
}

// A block a head of a sequence. A sink is one more score, of a value that is zero.
template <typename T>
__global__ void __launch_bounds__(kThreads) merge(const float* parts, const float* sinks, T* out, int heads, int size, int splits) {
  const float* from = parts + static_cast<I64>(blockIdx.x) * splits * (size + 2);
  const float sink = sinks ? sinks[blockIdx.x % heads] : -INFINITY;
  float top = sink;
  for (int s = 0; s < splits; ++s) top = fmaxf(top, from[s * (size + 2)]);
  for (int j = threadIdx.x; j < size; j += kThreads) {
    float total = share(sink, top), sum = 0;
    for (int s = 0; s < splits; ++s) {
      const float* part = from + s * (size + 2);
      const float kept = share(part[0], top);
      total += part[1] * kept;
      sum += part[2 + j] * kept;
    }
    out[static_cast<I64>(blockIdx.x) * size + j] = Narrow<T>::of(total > 0 ? sum / total : 0.0f);
  }
}

}  // namespace

void paged_attention(const PagedAttention& a, void* stream) {
  if (a.rows == 0 || a.heads == 0) return;
  const I64 chunks = ceil_div(a.heads / a.kv_heads, I64(kGroup));
  Shape shape{a.positions, a.width, a.window, static_cast<int>(a.heads), static_cast<int>(a.kv_heads),
              static_cast<int>(a.size), static_cast<int>(a.splits), kWarp, a.cap, 1.0f / std::sqrt(float(a.size))};
  with_kind(a.q.kind, [&](auto t) {
    using T = typename decltype(t)::Type;
    constexpr int V = 16 / sizeof(T);
    const I64 packs = a.size / V;
    const bool fits = a.size % V == 0 && packs <= kWarp && (packs & (packs - 1)) == 0 && aligned(a.keys) && aligned(a.values);
    if (fits) shape.lanes = static_cast<int>(packs);
    const auto kernel = fits ? attend<T, V, 1> : attend<T, 1, 8>;
    LAUNCH(kernel, dim3(a.rows, a.kv_heads * chunks, a.splits), dim3(kThreads), 0, stream, a.q.as<T>(), a.keys.as<T>(),
           a.values.as<T>(), a.table.as<I64>(), a.lengths.as<I64>(), a.parts.as<float>(), shape);
    const auto second = merge<T>;
    LAUNCH(second, dim3(a.rows * a.heads), dim3(kThreads), 0, stream, a.parts.as<float>(), a.sinks.as<float>(),
           a.out.as<T>(), shape.heads, shape.size, shape.splits);
  });
}
