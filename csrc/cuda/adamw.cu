// Adam and AdamW of many tensors in one launch: gradients are scaled by a clip factor, moments and fp32 parameters
// updated, and the parameters' narrow copies written, in one pass (28 to 30 bytes a parameter).
#include "launch.hpp"
#include "types.cuh"

namespace {

constexpr int kTensors = 24, kThreads = 256, kPack = 4, kPacks = 4;
constexpr int kChunk = kThreads * kPack * kPacks;  // elements of a block

struct Lists {
  float *params[kTensors], *averages[kTensors], *squares[kTensors];
  const void* grads[kTensors];
  void* copies[kTensors];
  I64 sizes[kTensors];
  int first[kTensors + 1];  // the first block of each
};

struct Rule {
  float lr, beta1, beta2, rest1, rest2, log_beta1, log_beta2, eps, decay;
  bool decoupled;
};

struct Clock {
  const float *count, *skip, *clip;
};

template <typename G, typename C, int V>
__global__ void __launch_bounds__(kThreads) update(Lists lists, int tensors, Rule rule, Clock clock) {
  if (*clock.skip != 0.0f) return;
  int tensor = 0;
  while (tensor + 1 < tensors && static_cast<int>(blockIdx.x) >= lists.first[tensor + 1]) ++tensor;
  const I64 begin = static_cast<I64>(blockIdx.x - lists.first[tensor]) * kChunk, size = lists.sizes[tensor];
  float *params = lists.params[tensor], *averages = lists.averages[tensor], *squares = lists.squares[tensor];
  const G* grads = static_cast<const G*>(lists.grads[tensor]);
  C* copies = static_cast<C*>(lists.copies[tensor]);
  const float step = *clock.count + 1.0f, clip = clock.clip ? *clock.clip : 1.0f;
  const float rate = rule.lr / -expm1f(step * rule.log_beta1), root = 1.0f / sqrtf(-expm1f(step * rule.log_beta2));
  for (I64 at = begin + threadIdx.x * V; at < begin + kChunk && at < size; at += kThreads * V) {
    Pack<float, V> p = load<V>(params + at), m = load<V>(averages + at), v = load<V>(squares + at);
    const Pack<G, V> grad = load<V>(grads + at);
    Pack<C, V> copy;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      float g = wide(grad.x[i]) * clip;
      if (rule.decoupled)
        p.x[i] -= rule.lr * rule.decay * p.x[i];
      else
        g += rule.decay * p.x[i];
      m.x[i] = rule.beta1 * m.x[i] + rule.rest1 * g;
      v.x[i] = rule.beta2 * v.x[i] + rule.rest2 * g * g;
      p.x[i] -= rate * m.x[i] / (sqrtf(v.x[i]) * root + rule.eps);
      copy.x[i] = Narrow<C>::of(p.x[i]);
    }
    store(params + at, p);
    store(averages + at, m);
    store(squares + at, v);
    if (copies) store(copies + at, copy);
  }
}

}  // namespace

void adamw(const Adamw& a, void* stream) {
  const Rule rule{a.lr, a.beta1, a.beta2, a.rest1, a.rest2, a.log_beta1, a.log_beta2, a.eps, a.decay, a.decoupled};
  const Clock clock{a.count.as<float>(), a.skip.as<float>(), a.clip.as<float>()};
  for (size_t begin = 0; begin < a.params.size(); begin += kTensors) {
    Lists lists{};
    int tensors = 0, blocks = 0;
    bool fits = true;
    for (size_t i = begin; i < a.params.size() && i < begin + kTensors; ++i) {
      if (a.sizes[i] == 0) continue;
      const Array copy = a.copies.empty() ? Array{} : a.copies[i];
      lists.params[tensors] = a.params[i].as<float>(), lists.grads[tensors] = a.grads[i].data;
      lists.averages[tensors] = a.averages[i].as<float>(), lists.squares[tensors] = a.squares[i].as<float>();
      lists.copies[tensors] = copy.data, lists.sizes[tensors] = a.sizes[i], lists.first[tensors] = blocks;
      blocks += static_cast<int>(ceil_div(a.sizes[i], I64(kChunk)));
      fits = fits && a.sizes[i] % kPack == 0 && aligned(copy);
      for (const auto* list : {&a.params, &a.grads, &a.averages, &a.squares}) fits = fits && aligned((*list)[i]);
      ++tensors;
    }
    if (tensors == 0) continue;
    const Kind narrow = a.copies.empty() ? Kind::bf16 : a.copies[begin].kind;
    const auto run = [&](auto g, auto c) {
      using G = typename decltype(g)::Type;
      using C = typename decltype(c)::Type;
      const auto kernel = fits ? update<G, C, kPack> : update<G, C, 1>;
      LAUNCH(kernel, dim3(blocks), dim3(kThreads), 0, stream, lists, tensors, rule, clock);
    };
    with_kind(a.grads[begin].kind, [&](auto g) {
      if (narrow == Kind::f16)
        run(g, Tag<F16>{});
      else
        run(g, Tag<Bf16>{});
    });
  }
}
