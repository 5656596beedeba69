// Softmax of rows of logits: what a token's loss needs (largest, sum of exponentials, the label's, moment), in one pass;
// and the gradient of the logits in their place. A block a row, which may begin at any address: the elements in front of
// the first whole 16 bytes and behind the last are taken one by one, since vocabularies are not padded.
#include "launch.hpp"
#include "types.cuh"

namespace {

constexpr int kThreads = 512;

// Calls run(values, index of the first) for the packs of this thread; `values` is a Pack of one or of 16 bytes.
template <typename T, typename Run>
DEVICE void each_of_row(const T* row, int count, Run run) {
  constexpr int V = 16 / sizeof(T);
  const int before = static_cast<int>((16 - reinterpret_cast<std::uintptr_t>(row) % 16) % 16 / sizeof(T));
  const int head = before < count ? before : count, packs = (count - head) / V, tail = head + packs * V;
  for (int i = threadIdx.x; i < head; i += kThreads) run(load<1>(row + i), i);
  for (int i = threadIdx.x; i < packs; i += kThreads) run(load<V>(row + head + i * V), head + i * V);
  for (int i = tail + threadIdx.x; i < count; i += kThreads) run(load<1>(row + i), i);
}

DEVICE float capped(float x, float cap) { return cap > 0 ? cap * tanhf(x / cap) : x; }

// Online: when a larger one comes, the sums so far shrink (arXiv 1805.02867).
struct Sums {
  float top, total, moment;

  DEVICE void raise(float to) {
    if (to == top) return;
    const float by = top - to, factor = __expf(by);
    if (total > 0) moment = factor * (moment + by * total);
    total *= factor;
    top = to;
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads) statistics(const T* logits, const I64* labels, float* tops, float* totals, float* at_label,
                           float* moments, I64 vocab, I64 begin, float scale, float cap) {
  SHARED(float, scratch, kWarp);
  const T* row = logits + static_cast<I64>(blockIdx.x) * vocab;
  Sums own{-INFINITY, 0, 0};
  each_of_row(row, static_cast<int>(vocab), [&](auto values, int) {
    constexpr int N = sizeof values.x / sizeof values.x[0];
    float z[N], top = own.top;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      z[i] = capped(wide(values.x[i]), cap) * scale;
      top = fmaxf(top, z[i]);
    }
    if (top == -INFINITY) return;
    own.raise(top);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float share = __expf(z[i] - top);
      own.total += share;
      if (share > 0) own.moment += share * (z[i] - top);
    }
  });
  const float top = block_max(own.top, scratch);
  if (own.top == -INFINITY)
    own = {top, 0, 0};
  else
    own.raise(top);
  const float total = block_sum(own.total, scratch);
  const float moment = moments ? block_sum(own.moment, scratch) : 0.0f;
  if (threadIdx.x != 0) return;
  const I64 label = labels[blockIdx.x] - begin;
  tops[blockIdx.x] = top;
  totals[blockIdx.x] = total;
  at_label[blockIdx.x] = label >= 0 && label < vocab ? capped(wide(row[label]), cap) * scale : 0.0f;
  if (moments) moments[blockIdx.x] = moment;
}

struct Upstream {
  const float *log_prob, *entropy, *logit;  // the last two may be null
};

// For z = logits * scale, p = softmax(z), H its entropy: d log p_y / d z_j = (j = y) - p_j, d H / d z_j = -p_j (log p_j + H).
template <typename T, typename O>
__global__ void __launch_bounds__(kThreads) gradient(const T* logits, const I64* labels, const float* lses, const float* entropies, Upstream up,
                         O* out, I64 vocab, I64 begin, float scale, float cap) {
  const I64 token = blockIdx.x, label = labels[token] - begin;
  const T* row = logits + token * vocab;
  O* to = out + token * vocab;
  const float lse = lses[token], of_log_prob = up.log_prob[token] * scale;
  const float entropy = up.entropy ? entropies[token] : 0.0f, of_entropy = up.entropy ? up.entropy[token] * scale : 0.0f;
  const float at_label = of_log_prob + (up.logit ? up.logit[token] * scale : 0.0f);
  each_of_row(row, static_cast<int>(vocab), [&](auto values, int first) {
    constexpr int N = sizeof values.x / sizeof values.x[0];
    Pack<O, N> result;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float bent = capped(wide(values.x[i]), cap), log_p = bent * scale - lse, p = __expf(log_p);
      float one = -of_log_prob * p;
      if (up.entropy && p > 0) one -= of_entropy * p * (log_p + entropy);
      if (first + i == label) one += at_label;
      if (cap > 0) one *= 1.0f - bent / cap * (bent / cap);
      result.x[i] = Narrow<O>::of(one);
    }
    if (sizeof(O) == sizeof(T)) {
      store(to + first, result);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) to[first + i] = result.x[i];
    }
  });
}

}  // namespace

void cross_entropy_statistics(const CrossEntropy& a, void* stream) {
  if (a.tokens == 0) return;
  with_kind(a.logits.kind, [&](auto t) {
    using T = typename decltype(t)::Type;
    const auto kernel = statistics<T>;
    LAUNCH(kernel, dim3(a.tokens), dim3(kThreads), 0, stream, a.logits.as<T>(), a.labels.as<I64>(), a.top.as<float>(),
           a.total.as<float>(), a.label.as<float>(), a.moment.as<float>(), a.vocab, a.begin, 1.0f / a.temperature, a.cap);
  });
}

void cross_entropy_gradient(const CrossEntropyGradient& a, void* stream) {
  if (a.tokens == 0 || a.vocab == 0) return;
  const Upstream up{a.of_log_prob.as<float>(), a.of_entropy.as<float>(), a.of_logit.as<float>()};
  with_kind(a.logits.kind, [&](auto t) {
    using T = typename decltype(t)::Type;
    const auto run = [&](auto o) {
      using O = typename decltype(o)::Type;
      const auto kernel = gradient<T, O>;
      LAUNCH(kernel, dim3(a.tokens), dim3(kThreads), 0, stream, a.logits.as<T>(), a.labels.as<I64>(),
             a.lse.as<float>(), a.entropy.as<float>(), up, a.out.as<O>(), a.vocab, a.begin, 1.0f / a.temperature, a.cap);
    };
    if (a.out.kind == a.logits.kind) return run(t);
    if (a.out.kind == Kind::f32) return run(Tag<float>{});
    throw std::invalid_argument("cross_entropy_gradient: the result has the dtype of the logits, or float32");
  });
}
