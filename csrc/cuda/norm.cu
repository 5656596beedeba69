// RMSNorm and LayerNorm of rows, forward and backward, with an addition before them. A warp takes a row of up to
// kItems packs a lane, a block a longer one; what fits is kept in registers between the passes, the rest is read again.
#include "launch.hpp"
#include "types.cuh"

namespace {

constexpr int kItems = 4, kRowsOfWarps = 4;
// With so many threads in a block each has 128 registers; the gradients of LayerNorm need more.
constexpr int kMaxThreads = 512, kFewThreads = 256;

// Sums over the threads of a row: a warp, or a block.
DEVICE float row_sum(float value, float* scratch) { return blockDim.x == kWarp ? warp_sum(value) : block_sum(value, scratch); }

template <typename T, int V>
struct Row {
  Pack<T, V> kept[kItems];
  T* at;
  int packs;

  // Calls run(values, pack number) for the packs of this thread.
  template <typename Run>
  DEVICE void each(Run run) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int pack = threadIdx.x + i * blockDim.x;
      if (pack < packs) run(kept[i], pack);
    }
    for (int pack = threadIdx.x + kItems * blockDim.x; pack < packs; pack += blockDim.x) {
      Pack<T, V> values = load<V>(at + static_cast<I64>(pack) * V);
      run(values, pack);
    }
  }
};

template <typename T, typename W, int V, bool MEAN>
__global__ void __launch_bounds__(kMaxThreads) forward(const T* x, const T* residual, const W* weight, const W* bias, T* y, T* sum, float* means,
                        float* scales, I64 rows, int width, float eps) {
  SHARED(float, scratch, kWarp);
  const I64 row = static_cast<I64>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= rows) return;  // a whole warp
  T* from = const_cast<T*>((residual ? sum : x) + row * width);
  Row<T, V> own{{}, from, width / V};
  float total = 0;
  const auto first = [&](Pack<T, V>& values, int pack) {
    const I64 place = row * width + static_cast<I64>(pack) * V;
    values = load<V>(x + place);
    if (residual) {
      const Pack<T, V> other = load<V>(residual + place);
#pragma unroll
      for (int i = 0; i < V; ++i) values.x[i] = Narrow<T>::of(wide(values.x[i]) + wide(other.x[i]));
      store(sum + place, values);
    }
#pragma unroll
    for (int i = 0; i < V; ++i) total += MEAN ? wide(values.x[i]) : wide(values.x[i]) * wide(values.x[i]);
  };
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int pack = threadIdx.x + i * blockDim.x;
    if (pack < own.packs) first(own.kept[i], pack);
  }
  for (int pack = threadIdx.x + kItems * blockDim.x; pack < own.packs; pack += blockDim.x) {
    Pack<T, V> values;
    first(values, pack);
  }
  total = row_sum(total, scratch);
  const float mean = MEAN ? total / width : 0.0f;
  if (MEAN) {
    float squares = 0;
    own.each([&](Pack<T, V>& values, int) {
#pragma unroll
      for (int i = 0; i < V; ++i) squares += (wide(values.x[i]) - mean) * (wide(values.x[i]) - mean);
    });
    total = row_sum(squares, scratch);
  }
  const float scale = 1.0f / sqrtf(total / width + eps);
  if (threadIdx.x == 0) {
    scales[row] = scale;
    if (MEAN) means[row] = mean;
  }
  own.each([&](Pack<T, V>& values, int pack) {
    Pack<T, V> result;
    const Pack<W, V> by = load<V>(weight + pack * V), added = MEAN && bias ? load<V>(bias + pack * V) : by;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      float one = (wide(values.x[i]) - mean) * scale * wide(by.x[i]);
      if (MEAN && bias) one += wide(added.x[i]);
      result.x[i] = Narrow<T>::of(one);
    }
    store(y + row * width + static_cast<I64>(pack) * V, result);
  });
}

// Each of `parts` streams of rows sums the weight's gradient of its rows in its own row of grad_weight: the caller adds
// those up, in a fixed order.
template <typename T, typename W, int V, bool MEAN>
__global__ void __launch_bounds__(MEAN ? kFewThreads : kMaxThreads) backward(const T* grad, const T* grad_sum, const T* x, const W* weight, const float* means,
                         const float* scales, T* grad_x, float* grad_weight, float* grad_bias, I64 rows, int width,
                         int parts) {
  SHARED(float, scratch, kWarp);
  const int part = blockIdx.x * blockDim.y + threadIdx.y;
  if (part >= parts) return;  // a whole warp
  float sums[kItems][V] = {}, bias_sums[MEAN ? kItems : 1][V] = {};
  float *of_weight = grad_weight + static_cast<I64>(part) * width, *of_bias = grad_bias + static_cast<I64>(part) * width;
  const int packs = width / V;
  for (I64 row = part; row < rows; row += parts) {
    const float scale = scales[row], mean = MEAN ? means[row] : 0.0f;
    Row<T, V> values{{}, const_cast<T*>(x) + row * width, packs}, upstream{{}, const_cast<T*>(grad) + row * width, packs};
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int pack = threadIdx.x + i * blockDim.x;
      if (pack >= packs) continue;
      values.kept[i] = load<V>(values.at + static_cast<I64>(pack) * V);
      upstream.kept[i] = load<V>(upstream.at + static_cast<I64>(pack) * V);
    }
    float product = 0, total = 0;
    // Calls run(x, upstream gradient, item or -1, pack number).
    const auto each = [&](auto run) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const int pack = threadIdx.x + i * blockDim.x;
        if (pack < packs) run(values.kept[i], upstream.kept[i], i, pack);
      }
      for (int pack = threadIdx.x + kItems * blockDim.x; pack < packs; pack += blockDim.x)
        run(load<V>(values.at + static_cast<I64>(pack) * V), load<V>(upstream.at + static_cast<I64>(pack) * V), -1, pack);
    };
    each([&](const Pack<T, V>& one, const Pack<T, V>& dy, int item, int pack) {
      const Pack<W, V> by = load<V>(weight + pack * V);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float unit = (wide(one.x[i]) - mean) * scale, up = wide(dy.x[i]), share = up * wide(by.x[i]);
        product += share * unit;
        if (MEAN) total += share;
        if (item >= 0) {
          sums[item < 0 ? 0 : item][i] += up * unit;
          if (MEAN) bias_sums[item < 0 ? 0 : item][i] += up;
        } else {
          const I64 place = static_cast<I64>(pack) * V + i;
          of_weight[place] = (row == part ? 0.0f : of_weight[place]) + up * unit;
          if (MEAN) of_bias[place] = (row == part ? 0.0f : of_bias[place]) + up;
        }
      }
    });
    product = row_sum(product, scratch) / width;
    if (MEAN) total = row_sum(total, scratch) / width;
    each([&](const Pack<T, V>& one, const Pack<T, V>& dy, int, int pack) {
      const I64 place = row * width + static_cast<I64>(pack) * V;
      const Pack<W, V> by = load<V>(weight + pack * V);
      Pack<T, V> result = grad_sum ? load<V>(grad_sum + place) : one;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float unit = (wide(one.x[i]) - mean) * scale;
        float down = (wide(dy.x[i]) * wide(by.x[i]) - total - unit * product) * scale;
        if (grad_sum) down += wide(result.x[i]);
        result.x[i] = Narrow<T>::of(down);
      }
      store(grad_x + place, result);
    });
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int pack = threadIdx.x + i * blockDim.x;
    if (pack >= packs) continue;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      of_weight[pack * V + j] = sums[i][j];
      if (MEAN) of_bias[pack * V + j] = bias_sums[MEAN ? i : 0][j];
    }
  }
}

dim3 threads_for(int packs, int most) {
  if (packs <= kWarp * kItems) return dim3(kWarp, kRowsOfWarps);
  const int lanes = ceil_div(ceil_div(packs, kItems), kWarp) * kWarp;
  return dim3(lanes < most ? lanes : most, 1);
}

// Calls run(T, W, V) for the kinds of rows and weights and for whether packs of 16 bytes fit.
template <typename Run>
void with_shape(const Array& x, const Array& weight, bool packed, Run run) {
  with_kind(x.kind, [&](auto t) {
    using T = typename decltype(t)::Type;
    const auto with_weight = [&](auto w) {
      if (packed)
        run(t, w, std::integral_constant<int, 16 / sizeof(T)>{});
      else
        run(t, w, std::integral_constant<int, 1>{});
    };
    if (weight.kind == x.kind) return with_weight(t);
    if (weight.kind == Kind::f32) return with_weight(Tag<float>{});
    throw std::invalid_argument("a norm's weight has the dtype of the rows, or float32");
  });
}

}  // namespace

void norm_forward(const NormForward& a, void* stream) {
  if (a.rows == 0 || a.width == 0) return;
  const bool fits = aligned(a.x) && aligned(a.residual) && aligned(a.y) && aligned(a.sum) && aligned(a.weight) && aligned(a.bias);
  const int pack = 16 / (a.x.kind == Kind::f32 ? 4 : 2);
  with_shape(a.x, a.weight, fits && a.width % pack == 0, [&](auto t, auto w, auto v) {
    using T = typename decltype(t)::Type;
    using W = typename decltype(w)::Type;
    constexpr int V = decltype(v)::value;
    const dim3 threads = threads_for(static_cast<int>(a.width / V), kMaxThreads);
    const auto kernel = a.mean.data ? forward<T, W, V, true> : forward<T, W, V, false>;
    LAUNCH(kernel, dim3(ceil_div(a.rows, I64(threads.y))), threads, 0, stream, a.x.as<T>(), a.residual.as<T>(),
           a.weight.as<W>(), a.bias.as<W>(), a.y.as<T>(), a.sum.as<T>(), a.mean.as<float>(), a.scale.as<float>(),
           a.rows, static_cast<int>(a.width), a.eps);
  });
}

void norm_backward(const NormBackward& a, void* stream) {
  if (a.rows == 0 || a.width == 0) return;
  const bool fits = aligned(a.x) && aligned(a.grad) && aligned(a.grad_x) && aligned(a.grad_sum) && aligned(a.weight);
  const int pack = 16 / (a.x.kind == Kind::f32 ? 4 : 2);
  with_shape(a.x, a.weight, fits && a.width % pack == 0, [&](auto t, auto w, auto v) {
    using T = typename decltype(t)::Type;
    using W = typename decltype(w)::Type;
    constexpr int V = decltype(v)::value;
    const dim3 threads = threads_for(static_cast<int>(a.width / V), a.mean.data ? kFewThreads : kMaxThreads);
    const auto kernel = a.mean.data ? backward<T, W, V, true> : backward<T, W, V, false>;
    LAUNCH(kernel, dim3(ceil_div(a.parts, I64(threads.y))), threads, 0, stream, a.grad.as<T>(), a.grad_sum.as<T>(),
           a.x.as<T>(), a.weight.as<W>(), a.mean.as<float>(), a.scale.as<float>(), a.grad_x.as<T>(),
           a.grad_weight.as<float>(), a.grad_bias.as<float>(), a.rows, static_cast<int>(a.width),
           static_cast<int>(a.parts));
  });
}
