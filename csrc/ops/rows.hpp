// Operations on rows: RMSNorm, SwiGLU, rotary embedding, softmax over a vocabulary. Arithmetic is fp32 whatever is stored.

template <typename T, typename W>
static void norm_rows(const Rows& at, const T* x, const W* weight, float eps, T* out, float* scale, I64 begin, I64 end) {
  for (I64 row = begin; row < end; ++row) {
    const T* from = x + row * at.size;
    Vec squares = {};
    for (I64 i = 0; i < at.size; i += WIDTH) {
      const Vec v = load_some(from + i, at.size - i);
      squares += v * v;
    }
    const float s = 1.0f / __builtin_sqrtf(sum(squares) / at.size + eps);
    scale[row] = s;
    for (I64 i = 0; i < at.size; i += WIDTH) {
      const I64 left = at.size - i;
      store_some(out + row * at.size + i, load_some(from + i, left) * s * load_some(weight + i, left), left);
    }
  }
}

// grad_weight: a row of sums for each call, which starts at zero.
template <typename T, typename W>
static void norm_rows_backward(const Rows& at, const T* grad, const T* x, const W* weight, const float* scale, T* out,
                               float* grad_weight, I64 begin, I64 end) {
  for (I64 row = begin; row < end; ++row) {
    const T *g = grad + row * at.size, *from = x + row * at.size;
    const float s = scale[row];
    Vec dot = {};
    for (I64 i = 0; i < at.size; i += WIDTH) {
      const I64 left = at.size - i;
      const Vec unit = load_some(from + i, left) * s, there = load_some(g + i, left);
      const Vec product = there * unit;
      store_some(grad_weight + i, load_some(grad_weight + i, left) + product, left);
      dot += product * load_some(weight + i, left);
    }
    const float shared = sum(dot) / at.size;
    for (I64 i = 0; i < at.size; i += WIDTH) {
      const I64 left = at.size - i;
      const Vec unit = load_some(from + i, left) * s, there = load_some(g + i, left) * load_some(weight + i, left);
      store_some(out + row * at.size + i, (there - unit * shared) * s, left);
    }
  }
}

static void rms_norm(const Rows& at, const void* x, const void* weight, bool half_weight, float eps, void* out, float* scale,
                     I64 begin, I64 end) {
  const auto *xf = static_cast<const float*>(x), *wf = static_cast<const float*>(weight);
  const auto *xh = static_cast<const Half*>(x), *wh = static_cast<const Half*>(weight);
  auto *of = static_cast<float*>(out);
  auto *oh = static_cast<Half*>(out);
  if (at.half && half_weight) return norm_rows(at, xh, wh, eps, oh, scale, begin, end);
  if (at.half) return norm_rows(at, xh, wf, eps, oh, scale, begin, end);
  if (half_weight) return norm_rows(at, xf, wh, eps, of, scale, begin, end);
  norm_rows(at, xf, wf, eps, of, scale, begin, end);
}

static void rms_norm_backward(const Rows& at, const void* grad, const void* x, const void* weight, bool half_weight,
                              const float* scale, void* out, float* grad_weight, I64 begin, I64 end) {
  const auto *gf = static_cast<const float*>(grad), *xf = static_cast<const float*>(x), *wf = static_cast<const float*>(weight);
  const auto *gh = static_cast<const Half*>(grad), *xh = static_cast<const Half*>(x), *wh = static_cast<const Half*>(weight);
  auto *of = static_cast<float*>(out);
  auto *oh = static_cast<Half*>(out);
  if (at.half && half_weight) return norm_rows_backward(at, gh, xh, wh, scale, oh, grad_weight, begin, end);
  if (at.half) return norm_rows_backward(at, gh, xh, wf, scale, oh, grad_weight, begin, end);
  if (half_weight) return norm_rows_backward(at, gf, xf, wh, scale, of, grad_weight, begin, end);
  norm_rows_backward(at, gf, xf, wf, scale, of, grad_weight, begin, end);
}

// both [rows, 2, size], the gate first.
template <typename T>
static void swiglu_rows(const Rows& at, const T* both, T* out, I64 begin, I64 end) {
  for (I64 row = begin; row < end; ++row) {
    const T *gate = both + row * 2 * at.size, *up_ = gate + at.size;
    for (I64 i = 0; i < at.size; i += WIDTH) {
      const I64 left = at.size - i;
      const Vec g = load_some(gate + i, left), u = load_some(up_ + i, left);
      store_some(out + row * at.size + i, g / (1.0f + exponential(-g)) * u, left);
    }
  }
}
static void swiglu(const Rows& at, const void* both, void* out, I64 begin, I64 end) {
  if (at.half) return swiglu_rows(at, static_cast<const Half*>(both), static_cast<Half*>(out), begin, end);
  swiglu_rows(at, static_cast<const float*>(both), static_cast<float*>(out), begin, end);
}

template <typename T>
static void swiglu_rows_backward(const Rows& at, const T* grad, const T* both, T* out, I64 begin, I64 end) {
  for (I64 row = begin; row < end; ++row) {
    const T *gate = both + row * 2 * at.size, *up_ = gate + at.size;
    T *to_gate = out + row * 2 * at.size, *to_up = to_gate + at.size;
    for (I64 i = 0; i < at.size; i += WIDTH) {
      const I64 left = at.size - i;
      const Vec g = load_some(gate + i, left), u = load_some(up_ + i, left), d = load_some(grad + row * at.size + i, left);
      const Vec share = 1.0f / (1.0f + exponential(-g));
      store_some(to_up + i, d * g * share, left);
      store_some(to_gate + i, d * u * share * (1.0f + g * (1.0f - share)), left);
    }
  }
}
static void swiglu_backward(const Rows& at, const void* grad, const void* both, void* out, I64 begin, I64 end) {
  if (at.half)
    return swiglu_rows_backward(at, static_cast<const Half*>(grad), static_cast<const Half*>(both), static_cast<Half*>(out),
                                begin, end);
  swiglu_rows_backward(at, static_cast<const float*>(grad), static_cast<const float*>(both), static_cast<float*>(out), begin,
                       end);
}

// Items: tokens of all rows. x [B, T, H, size] by strides, cos and sin [B, T, half], out contiguous; halves are pairs.
template <typename T>
static void rope_rows(const Strided& x, const float* cos, const float* sin, T* out, I64 tokens, I64 heads, I64 size, I64 half,
                      float sign, I64 begin, I64 end) {
  for (I64 item = begin; item < end; ++item)
    for (I64 head = 0; head < heads; ++head) {
      const T* from = reinterpret_cast<const T*>(x.data) + item / tokens * x.batch + item % tokens * x.token + head * x.head;
      T* to = out + (item * heads + head) * size;
      for (I64 i = 0; i < half; i += WIDTH) {
        if (half >= WIDTH) i = least(i, half - WIDTH);  // the last ones again, instead of a part of a vector
        const I64 left = half - i;
        const Vec c = load_some(cos + item * half + i, left), s = load_some(sin + item * half + i, left) * sign;
        const Vec first = load_some(from + i, left), second = load_some(from + half + i, left);
        store_some(to + i, first * c - second * s, left);
        store_some(to + half + i, second * c + first * s, left);
      }
      for (I64 i = 2 * half; i < size; ++i) to[i] = from[i];
    }
}
static void rope(const Strided& x, const float* cos, const float* sin, void* out, I64 tokens, I64 heads, I64 size, I64 half,
                 float sign, I64 begin, I64 end) {
  if (x.half) return rope_rows(x, cos, sin, static_cast<Half*>(out), tokens, heads, size, half, sign, begin, end);
  rope_rows(x, cos, sin, static_cast<float*>(out), tokens, heads, size, half, sign, begin, end);
}

// Of z = logits / temperature: top, sum of exp(z - top), the label's z (0: elsewhere), and where wanted the sum of
// exp(z - top) (z - top) and the first place of the largest.
template <typename T>
static void statistics_rows(const Softmax& at, I64 size, const T* logits, float* top, float* total, float* label, float* moment,
                            I64* best, I64 begin, I64 end) {
  const float factor = 1.0f / at.temperature;
  for (I64 row = begin; row < end; ++row) {
    const T* from = logits + row * size;
    Vec large = all(-kInfinity), larger_ = large;
    I64 i = 0;
    for (; i + 2 * WIDTH <= size; i += 2 * WIDTH) {
      large = larger(large, load(from + i));
      larger_ = larger(larger_, load(from + i + WIDTH));
    }
    for (; i + WIDTH <= size; i += WIDTH) large = larger(large, load(from + i));
    const IVec rest = counting() < static_cast<int>(size - i);
    if (i < size) large = larger(large, pick(rest, load_some(from + i, size - i), all(-kInfinity)));
    const float peak = largest(larger(large, larger_));
    Vec sums = {}, sums_ = {}, moments = {};
    const auto part = [&](Vec z, Vec& into) __attribute__((always_inline)) {
      z = (z - peak) * factor;
      const Vec power = exponential(z);
      into += power;
      if (moment) moments += pick(power > Vec{}, power * z, Vec{});
    };
    i = 0;
    for (; i + 2 * WIDTH <= size; i += 2 * WIDTH) {
      part(load(from + i), sums);
      part(load(from + i + WIDTH), sums_);
    }
    for (; i + WIDTH <= size; i += WIDTH) part(load(from + i), sums);
    if (i < size) part(pick(rest, load_some(from + i, size - i), all(-kInfinity)), sums);
    top[row] = peak * factor;
    total[row] = sum(sums + sums_);
    if (moment) moment[row] = sum(moments);
    const I64 place = at.labels[row] - at.begin;
    label[row] = place >= 0 && place < size ? one(from + place) * factor : 0.0f;
    if (best) {
      I64 found = 0;
      while (found + 1 < size && one(from + found) != peak) ++found;
      best[row] = found;
    }
  }
}
static void softmax_statistics(const Softmax& at, I64 size, const void* logits, float* top, float* total, float* label,
                               float* moment, I64* best, I64 begin, I64 end) {
  if (at.half)
    return statistics_rows(at, size, static_cast<const Half*>(logits), top, total, label, moment, best, begin, end);
  statistics_rows(at, size, static_cast<const float*>(logits), top, total, label, moment, best, begin, end);
}

template <typename T, typename U>
static void gradient_rows(const Softmax& at, I64 size, const T* logits, const float* lse, const float* entropy,
                          const float* of_log_prob, const float* of_entropy, const float* at_label, U* out, I64 begin, I64 end) {
  const float factor = 1.0f / at.temperature;
  for (I64 row = begin; row < end; ++row) {
    const T* from = logits + row * size;
    U* to = out + row * size;
    const float up_ = -of_log_prob[row], turn = of_entropy ? -of_entropy[row] : 0.0f, h = of_entropy ? entropy[row] : 0.0f;
    const I64 place = at.labels[row] - at.begin;
    const bool here = place >= 0 && place < size;
    float label = here ? one(from + place) * factor - lse[row] : 0.0f;  // before it may be overwritten
    for (I64 i = 0; i < size; i += WIDTH) {
      const Vec z = load_some(from + i, size - i) * factor - lse[row];
      Vec share = exponential(z);
      share = of_entropy ? share * (turn * (z + h) + up_) : share * up_;
      store_some(to + i, share, size - i);
    }
    if (here) {
      const Vec z = all(label), share = exponential(z);
      const Vec made = (of_entropy ? share * (turn * (z + h) + up_) : share * up_) + at_label[row];
      store_some(to + place, made, 1);
    }
  }
}
static void softmax_gradient(const Softmax& at, I64 size, const void* logits, const float* lse, const float* entropy,
                             const float* of_log_prob, const float* of_entropy, const float* at_label, void* out, I64 begin,
                             I64 end) {
  const auto* narrow = static_cast<const Half*>(logits);
  const auto* wide = static_cast<const float*>(logits);
  auto* to_narrow = static_cast<Half*>(out);
  auto* to_wide = static_cast<float*>(out);
  if (at.half && at.half_out)
    return gradient_rows(at, size, narrow, lse, entropy, of_log_prob, of_entropy, at_label, to_narrow, begin, end);
  if (at.half) return gradient_rows(at, size, narrow, lse, entropy, of_log_prob, of_entropy, at_label, to_wide, begin, end);
  gradient_rows(at, size, wide, lse, entropy, of_log_prob, of_entropy, at_label, to_wide, begin, end);
}
