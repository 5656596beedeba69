// Tokens to the order of their experts and back, all as gathers: copies of tokens, weighted sums of copies, and the
// gradient of the weights. Copy t k + j is token t's for its j-th expert; `slots` says which row a copy is, -1 none.
#include "launch.hpp"
#include "types.cuh"

namespace {

constexpr int kThreads = 256;

// out[i] = x[order[i] / copies], times weights[order[i]] where there are some.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) gather(const T* x, const I64* order, const float* weights, T* out, I64 packs, int packs_of_row, int copies) {
  const I64 pack = static_cast<I64>(blockIdx.x) * kThreads + threadIdx.x;
  if (pack >= packs) return;
  const I64 row = pack / packs_of_row, copy = order[row], column = pack % packs_of_row * V;
  Pack<T, V> values = load<V>(x + copy / copies * packs_of_row * V + column);
  if (weights) {
    const float weight = weights[copy];
#pragma unroll
    for (int i = 0; i < V; ++i) values.x[i] = Narrow<T>::of(wide(values.x[i]) * weight);
  }
  store(out + pack * V, values);
}

// out[t] = sum over j of x[slots[t, j]], times weights[t, j] where there are some.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) gather_sum(const T* x, const I64* slots, const float* weights, T* out, I64 packs, int packs_of_row, int copies) {
  const I64 pack = static_cast<I64>(blockIdx.x) * kThreads + threadIdx.x;
  if (pack >= packs) return;
  const I64 token = pack / packs_of_row, column = pack % packs_of_row * V;
  float sums[V] = {};
  for (int j = 0; j < copies; ++j) {
    const I64 row = slots[token * copies + j];
    if (row < 0) continue;
    const float weight = weights ? weights[token * copies + j] : 1.0f;
    const Pack<T, V> values = load<V>(x + row * packs_of_row * V + column);
#pragma unroll
    for (int i = 0; i < V; ++i) sums[i] += wide(values.x[i]) * weight;
  }
  Pack<T, V> result;
#pragma unroll
  for (int i = 0; i < V; ++i) result.x[i] = Narrow<T>::of(sums[i]);
  store(out + pack * V, result);
}

// out[t, j] = grad[t] . x[slots[t, j]]: a warp each.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) gather_dot(const T* x, const I64* slots, const T* grad, float* out, I64 count, int packs_of_row, int copies) {
  const I64 copy = (static_cast<I64>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  if (copy >= count) return;  // a whole warp
  const I64 row = slots[copy], width = static_cast<I64>(packs_of_row) * V;
  float sum = 0;
  for (int pack = threadIdx.x % kWarp; row >= 0 && pack < packs_of_row; pack += kWarp) {
    const Pack<T, V> a = load<V>(x + row * width + pack * V), b = load<V>(grad + copy / copies * width + pack * V);
#pragma unroll
    for (int i = 0; i < V; ++i) sum += wide(a.x[i]) * wide(b.x[i]);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) out[copy] = sum;
}

// Calls run(T, V) for packs of 16 bytes where they fit, else for single elements.
template <typename Run>
void with_packs(Kind kind, bool fits, I64 width, Run run) {
  with_kind(kind, [&](auto t) {
    constexpr int V = 16 / sizeof(typename decltype(t)::Type);
    if (fits && width % V == 0)
      run(t, std::integral_constant<int, V>{});
    else
      run(t, std::integral_constant<int, 1>{});
  });
}

}  // namespace

void moe_gather(const Gather& a, void* stream) {
  if (a.rows == 0 || a.width == 0) return;
  with_packs(a.x.kind, aligned(a.x) && aligned(a.out), a.width, [&](auto t, auto v) {
    using T = typename decltype(t)::Type;
    constexpr int V = decltype(v)::value;
    const auto kernel = gather<T, V>;
    const I64 packs = a.rows * a.width / V;
    LAUNCH(kernel, dim3(ceil_div(packs, I64(kThreads))), dim3(kThreads), 0, stream, a.x.as<T>(), a.order.as<I64>(),
           a.weights.as<float>(), a.out.as<T>(), packs, static_cast<int>(a.width / V), static_cast<int>(a.copies));
  });
}

void moe_sum(const GatherSum& a, void* stream) {
  if (a.tokens == 0 || a.width == 0) return;
  with_packs(a.out.kind, aligned(a.x) && aligned(a.out), a.width, [&](auto t, auto v) {
    using T = typename decltype(t)::Type;
    constexpr int V = decltype(v)::value;
    const auto kernel = gather_sum<T, V>;
    const I64 packs = a.tokens * a.width / V;
    LAUNCH(kernel, dim3(ceil_div(packs, I64(kThreads))), dim3(kThreads), 0, stream, a.x.as<T>(), a.slots.as<I64>(),
           a.weights.as<float>(), a.out.as<T>(), packs, static_cast<int>(a.width / V), static_cast<int>(a.copies));
  });
}

void moe_dot(const GatherDot& a, void* stream) {
  if (a.tokens == 0 || a.copies == 0) return;
  with_packs(a.grad.kind, aligned(a.x) && aligned(a.grad), a.width, [&](auto t, auto v) {
    using T = typename decltype(t)::Type;
    constexpr int V = decltype(v)::value;
    const auto kernel = gather_dot<T, V>;
    const I64 count = a.tokens * a.copies;
    LAUNCH(kernel, dim3(ceil_div(count * kWarp, I64(kThreads))), dim3(kThreads), 0, stream, a.x.as<T>(),
           a.slots.as<I64>(), a.grad.as<T>(), a.out.as<float>(), count, static_cast<int>(a.width / V),
           static_cast<int>(a.copies));
  });
}
