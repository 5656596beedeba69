// Rotary embedding of heads, each perhaps normalised before (RMSNorm of queries and keys). A group of lanes takes a
// head of a token: its pairs (i, i + R/2) and the features behind R that only pass.
#include "launch.hpp"
#include "types.cuh"

namespace {

constexpr int kThreads = 256;

struct Shape {
  I64 rows, batch_stride, token_stride, head_stride, table_stride;
  int tokens, heads, size, half, lanes;
  float eps;

  DEVICE I64 place(I64 row) const {
    const I64 token = row / heads;
    return token / tokens * batch_stride + token % tokens * token_stride + row % heads * head_stride;
  }
  DEVICE I64 table(I64 row) const {
    const I64 token = row / heads;
    return token / tokens * table_stride + token % tokens * half;
  }
  // 1 over the root mean square of a head. Every lane of the warp takes part.
  template <typename T>
  DEVICE float scale(const T* x, int lane) const {
    float squares = 0;
    for (int i = lane; i < size; i += lanes) squares += wide(x[i]) * wide(x[i]);
    return 1.0f / sqrtf(warp_sum(squares, lanes) / size + eps);
  }
};

template <typename T, int V>
__global__ void __launch_bounds__(kThreads) rotate(const T* x, const float* cos, const float* sin, const float* weight, T* out, Shape at, float sign) {
  const I64 group = (static_cast<I64>(blockIdx.x) * kThreads + threadIdx.x) / at.lanes;
  const int lane = threadIdx.x % at.lanes, rest = at.size - 2 * at.half;
  const I64 row = group < at.rows ? group : at.rows - 1;  // those behind the last one help to sum
  const T* from = x + at.place(row);
  const float scale = weight ? at.scale(from, lane) : 1.0f;
  if (group >= at.rows) return;
  T* to = out + row * at.size;
  cos += at.table(row), sin += at.table(row);
  for (int i = lane * V; i < at.half; i += at.lanes * V) {
    Pack<T, V> left = load<V>(from + i), right = load<V>(from + at.half + i);
    const Pack<float, V> c = load<V>(cos + i), s = load<V>(sin + i);
    const Pack<float, V> first = weight ? load<V>(weight + i) : c, second = weight ? load<V>(weight + at.half + i) : s;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      float a = wide(left.x[j]), b = wide(right.x[j]);
      if (weight) a *= scale * first.x[j], b *= scale * second.x[j];
      left.x[j] = Narrow<T>::of(a * c.x[j] - b * s.x[j] * sign);
      right.x[j] = Narrow<T>::of(b * c.x[j] + a * s.x[j] * sign);
    }
    store(to + i, left);
    store(to + at.half + i, right);
  }
  for (int i = lane * V; i < rest; i += at.lanes * V) {
    Pack<T, V> values = load<V>(from + 2 * at.half + i);
    if (weight) {
#pragma unroll
      for (int j = 0; j < V; ++j)
        values.x[j] = Narrow<T>::of(wide(values.x[j]) * scale * weight[2 * at.half + i + j]);
    }
    store(to + 2 * at.half + i, values);
  }
}

// Of a normalised and rotated head: turned back, then the gradient of RMSNorm. Each of `parts` groups sums the weight's
// gradient of its rows in its own row of grad_weight. Two passes over a head, whose lines are in the cache by then.
template <typename T, int ITEMS>
__global__ void __launch_bounds__(kThreads) backward(const T* grad, const T* x, const float* cos, const float* sin, const float* weight, T* grad_x,
                         float* grad_weight, Shape at, Shape of_grad, int parts) {
  const I64 group = (static_cast<I64>(blockIdx.x) * kThreads + threadIdx.x) / at.lanes;
  const int lane = threadIdx.x % at.lanes;
  float sums[2 * ITEMS] = {};
  for (I64 base = 0; base < at.rows; base += parts) {
    const bool live = group < parts && base + group < at.rows;
    const I64 row = live ? base + group : at.rows - 1;
    const T *from = x + at.place(row), *up = grad + of_grad.place(row);
    const float *c = cos + at.table(row), *s = sin + at.table(row);
    const float scale = at.scale(from, lane);
    float product = 0, turned[2 * ITEMS];
    // Calls run(item, feature) for the features of this lane.
    const auto each = [&](auto run) {
#pragma unroll
      for (int item = 0; item < ITEMS; ++item) {
        const int i = lane + item * at.lanes;
        if (i < at.half) run(2 * item, i), run(2 * item + 1, at.half + i);
        else if (i < at.size - at.half) run(2 * item, at.half + i);
      }
    };
    each([&](int item, int i) {
      float g = wide(up[i]);
      if (i < at.half) g = g * c[i] + wide(up[at.half + i]) * s[i];
      else if (i < 2 * at.half) g = g * c[i - at.half] - wide(up[i - at.half]) * s[i - at.half];
      const float unit = wide(from[i]) * scale;
      turned[item] = g * weight[i];
      product += turned[item] * unit;
      if (live) sums[item] += g * unit;
    });
    product = warp_sum(product, at.lanes) / at.size;
    if (!live) continue;
    each([&](int item, int i) {
      grad_x[row * at.size + i] = Narrow<T>::of((turned[item] - wide(from[i]) * scale * product) * scale);
    });
  }
  if (group >= parts) return;
#pragma unroll
  for (int item = 0; item < ITEMS; ++item) {
    const int i = lane + item * at.lanes;
    float* to = grad_weight + group * at.size;
    if (i < at.half) to[i] = sums[2 * item], to[at.half + i] = sums[2 * item + 1];
    else if (i < at.size - at.half) to[at.half + i] = sums[2 * item];
  }
}

int lanes_for(I64 packs) {
  int lanes = 1;
  while (lanes < kWarp && lanes < packs) lanes *= 2;
  return lanes;
}

Shape shape_of(const Rope& a) {
  return {a.batch * a.tokens * a.heads, a.strides[0], a.strides[1], a.strides[2], a.table_stride,
          static_cast<int>(a.tokens), static_cast<int>(a.heads), static_cast<int>(a.size),
          static_cast<int>(a.rotated / 2), 1, a.eps};
}

}  // namespace

void rope(const Rope& a, void* stream) {
  Shape shape = shape_of(a);
  if (shape.rows == 0 || a.size == 0) return;
  with_kind(a.x.kind, [&](auto t) {
    using T = typename decltype(t)::Type;
    constexpr int V = 16 / sizeof(T);
    const auto run = [&](auto kernel, int pack) {
      const I64 packs = (shape.half > a.size - a.rotated ? shape.half : a.size - a.rotated) / pack;
      shape.lanes = lanes_for(packs);
      LAUNCH(kernel, dim3(ceil_div(shape.rows * shape.lanes, I64(kThreads))), dim3(kThreads), 0, stream, a.x.as<T>(),
             a.cos.as<float>(), a.sin.as<float>(), a.weight.as<float>(), a.out.as<T>(), shape, a.sign);
    };
    bool fits = aligned(a.x) && aligned(a.out) && aligned(a.cos) && aligned(a.sin) && aligned(a.weight);
    for (const I64 size : {I64(shape.half), a.size, a.strides[0], a.strides[1], a.strides[2]}) fits = fits && size % V == 0;
    if (fits)
      run(rotate<T, V>, V);
    else
      run(rotate<T, 1>, 1);
  });
}

void norm_rope_backward(const NormRopeBackward& a, void* stream) {
  Rope forward{a.x, a.cos, a.sin, a.weight, a.grad_x, a.batch, a.tokens, a.heads, a.size, a.rotated,
               {a.strides[0], a.strides[1], a.strides[2]}, a.table_stride, a.eps, -1.0f};
  Shape shape = shape_of(forward), of_grad = shape;
  of_grad.batch_stride = a.grad_strides[0], of_grad.token_stride = a.grad_strides[1], of_grad.head_stride = a.grad_strides[2];
  if (shape.rows == 0 || a.size == 0) return;
  const I64 items = a.size - shape.half;  // pairs, then single features
  shape.lanes = of_grad.lanes = lanes_for(items);
  if (items > 8 * shape.lanes) throw std::invalid_argument("norm_rope_backward: heads of at most 256 features");
  with_kind(a.x.kind, [&](auto t) {
    using T = typename decltype(t)::Type;
    const auto kernel = items > 4 * shape.lanes ? backward<T, 8> : items > shape.lanes ? backward<T, 4> : backward<T, 1>;
    LAUNCH(kernel, dim3(ceil_div(a.parts * shape.lanes, I64(kThreads))), dim3(kThreads), 0, stream, a.grad.as<T>(),
           a.x.as<T>(), a.cos.as<float>(), a.sin.as<float>(), a.weight.as<float>(), a.grad_x.as<T>(),
           a.grad_weight.as<float>(), shape, of_grad, static_cast<int>(a.parts));
  });
}
