// All plain blocks of a pipeline stage for some tokens of many sequences, on one CPU thread: embedding, norms, products,
// rotary embedding, cache writes, attention to the blocks of a paged cache, SwiGLU and logits in one call. The twin:
// models/decode.py. A weight is read where it lies, so what is trained is what generates.
//
// Products of few rows are bound by memory and by what a matrix library prepares for many. Here activations lie in
// panels `[features, P]` of P rows, one row in each lane of a vector or two: a number of a weight is read once, as it
// lies, and multiplies P rows, without sums across lanes and without packing. Up to four rows take P = 1, where a lane is
// a feature.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "decode.hpp"

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define TARGETS 1
#define V4 __attribute__((target("arch=x86-64-v4")))
#define V3 __attribute__((target("arch=x86-64-v3")))
#endif

namespace py = pybind11;

namespace {

constexpr I64 kFew = 4;              // rows up to which a lane is a feature
constexpr I64 kCached = 768 * 1024;  // bytes of panels that a weight meets before the next one is read
constexpr I64 kRows = 128;            // rows that go through all layers together, so that they stay in the cache
constexpr I64 kVocab = 480;          // rows of the head's matrix at a time
constexpr I64 kPart = 256;           // logits of which a draw keeps one sum

template <typename T, int LANES>
struct Vector {
  typedef T type __attribute__((vector_size(LANES * sizeof(T)), aligned(sizeof(T)), may_alias));
};

// y [n, P] (+)= w [n, k] x [k, P] for R rows of w; with V = 0, P = 1.
template <typename T, int LANES, int V, int R>
INLINE void tile(const T* w, I64 k, const T* x, T* y, bool add) {
  using Lanes = typename Vector<T, LANES>::type;
  if constexpr (V == 0) {
    Lanes sums[R] = {};
    I64 i = 0;
    for (; i + LANES <= k; i += LANES) {
      const Lanes part = *reinterpret_cast<const Lanes*>(x + i);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) sums[r] += *reinterpret_cast<const Lanes*>(w + r * k + i) * part;
    }
    for (int r = 0; r < R; ++r) {
      T sum = 0;
      for (int lane = 0; lane < LANES; ++lane) sum += sums[r][lane];
      for (I64 rest = i; rest < k; ++rest) sum += w[r * k + rest] * x[rest];
      y[r] = add ? y[r] + sum : sum;
    }
  } else {
    Lanes sums[R][V] = {};
    for (I64 i = 0; i < k; ++i) {
      Lanes part[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) part[v] = *reinterpret_cast<const Lanes*>(x + (i * V + v) * LANES);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) sums[r][v] += w[r * k + i] * part[v];
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        Lanes* to = reinterpret_cast<Lanes*>(y + (r * V + v) * LANES);
        *to = add ? *to + sums[r][v] : sums[r][v];
      }
  }
}

template <typename T>
struct Product {
  const T* weight;
  I64 n, k;
  const T* x;
  T* y;
  I64 panels, out;  // features of a panel of y
  bool add;
};

template <typename T, int LANES, int V, int R>
INLINE void product_rows(const Product<T>& p, I64 first, I64 end, I64 from, I64 to) {
  constexpr I64 P = V ? V * LANES : 1;
  for (I64 row = first; row + R <= end; row += R)
    for (I64 panel = from; panel < to; ++panel)
      tile<T, LANES, V, R>(p.weight + row * p.k, p.k, p.x + panel * p.k * P, p.y + (panel * p.out + row) * P, p.add);
}

template <typename T, int LANES, int V, int R>
INLINE void product_with(const Product<T>& p) {
  constexpr I64 P = V ? V * LANES : 1, size = sizeof(T);
  const I64 group = std::max<I64>(1, kCached / (p.k * P * size));
  const I64 whole = p.n / R * R, four = whole + (p.n - whole) / 4 * 4;
  for (I64 from = 0; from < p.panels; from += group) {
    const I64 to = std::min(p.panels, from + group);
    product_rows<T, LANES, V, R>(p, 0, whole, from, to);
    product_rows<T, LANES, V, 4>(p, whole, four, from, to);
    product_rows<T, LANES, V, 1>(p, four, p.n, from, to);
  }
}

template <typename T, int LANES, int R>
INLINE void product(int vectors, const Product<T>& p) {
  if (vectors == 0) return product_with<T, LANES, 0, 8>(p);
  if (vectors == 1) return product_with<T, LANES, 1, R>(p);
  product_with<T, LANES, 2, R>(p);
}

template <typename T, I64 P>
INLINE void norm_panel(const T* x, const T* weight, T* out, I64 size, double eps) {
  T scale[P] = {};
  for (I64 i = 0; i < size; ++i)
    for (I64 lane = 0; lane < P; ++lane) scale[lane] += x[i * P + lane] * x[i * P + lane];
  for (I64 lane = 0; lane < P; ++lane) scale[lane] = T(1) / std::sqrt(scale[lane] / T(size) + T(eps));
  for (I64 i = 0; i < size; ++i)
    for (I64 lane = 0; lane < P; ++lane) out[i * P + lane] = x[i * P + lane] * scale[lane] * weight[i];
}

template <typename T, int LANES>
INLINE void norm_panels(int vectors, const T* x, const T* weight, T* out, I64 panels, I64 size, double eps) {
  if (vectors == 0) return norm_rows(x, weight, out, panels, size, eps);
  const I64 step = size * vectors * LANES;
  for (I64 panel = 0; panel < panels; ++panel, x += step, out += step)
    if (vectors == 1)
      norm_panel<T, LANES>(x, weight, out, size, eps);
    else
      norm_panel<T, 2 * LANES>(x, weight, out, size, eps);
}

template <typename T>
struct Attend {
  const T *q, *kv, *q_norm, *k_norm, *cos, *sin;  // q [heads size, P] and kv [2 kv_heads size, P] in panels
  T *keys, *values, *out;                         // pools [kv_heads, positions, size]; out in panels, as q
  const I64 *sequences, *places, *turns, *table;  // of each row: its line of the table, its position, that of its tables
  I64 rows, heads, kv_heads, size, width, positions, window, lanes;
  double eps;
  T *head, *weights;  // room for one head, turned, and for the weights of all positions
};

// A head of one row out of its panel, normed where there is a norm: `into` [size].
template <typename T>
INLINE void take_head(const T* from, const T* norm, T* into, I64 size, I64 lanes, double eps) {
  for (I64 i = 0; i < size; ++i) into[i] = from[i * lanes];
  if (norm != nullptr) norm_rows(into, norm, into, 1, size, eps);
}

template <typename T>
INLINE void store_keys(const Attend<T>& a) {
  const I64 half = a.size / 2, features = 2 * a.kv_heads * a.size;
  for (I64 row = 0; row < a.rows; ++row) {
    const I64 at = a.places[row], *blocks = a.table + a.sequences[row] * a.width;
    const I64 place = blocks[at / kBlock] * kBlock + at % kBlock, turn = a.turns[row] * half;
    const T* panel = a.kv + row / a.lanes * features * a.lanes + row % a.lanes;
    for (I64 head = 0; head < a.kv_heads; ++head) {
      const I64 to = (head * a.positions + place) * a.size;
      take_head(panel + head * a.size * a.lanes, a.k_norm, a.head, a.size, a.lanes, a.eps);
      rotate(a.head, a.cos + turn, a.sin + turn, a.keys + to, half, T(1));
      const T* value = panel + (a.kv_heads + head) * a.size * a.lanes;
      for (I64 i = 0; i < a.size; ++i) a.values[to + i] = value[i * a.lanes];
    }
  }
}

template <typename T>
INLINE void attend_panels(const Attend<T>& a) {
  store_keys(a);
  const I64 half = a.size / 2, group = a.heads / a.kv_heads, features = a.heads * a.size;
  const T scale = T(1) / std::sqrt(T(a.size));
  T *turned = a.head + a.size, *result = turned + a.size;
  for (I64 row = 0; row < a.rows; ++row) {
    const I64 end = a.places[row] + 1, first = a.window ? std::max<I64>(end - a.window, 0) : 0;
    const I64 *blocks = a.table + a.sequences[row] * a.width, turn = a.turns[row] * half;
    const I64 panel = row / a.lanes * features * a.lanes + row % a.lanes;
    for (I64 head = 0; head < a.heads; ++head) {
      const I64 pool = head / group * a.positions, from = panel + head * a.size * a.lanes;
      take_head(a.q + from, a.q_norm, a.head, a.size, a.lanes, a.eps);
      rotate(a.head, a.cos + turn, a.sin + turn, turned, half, scale);
      attend_row(turned, a.keys + pool * a.size, a.values + pool * a.size, blocks, first, end, a.size, a.weights, result);
      for (I64 i = 0; i < a.size; ++i) a.out[from + i * a.lanes] = result[i];
    }
  }
}

template <typename T>
struct Draw {
  const T* logits;
  I64 size;
  double temperature, uniform;
  double* parts;  // room for a sum of each kPart logits
};

struct Drawn {
  I64 token;
  double plain, policy;
};

template <typename T>
INLINE T largest_of(const T* x, I64 size) {
  T most = x[0];
  for (I64 i = 1; i < size; ++i) most = x[i] > most ? x[i] : most;
  return most;
}

// Sum of e^(x scale - most), with one sum for each kPart where there is room.
template <typename T>
INLINE double exponentials(const T* x, I64 size, T scale, T most, double* parts) {
  double total = 0;
  for (I64 begin = 0, part = 0; begin < size; begin += kPart, ++part) {
    const I64 count = std::min(kPart, size - begin);
    T sum = 0;
    for (I64 i = 0; i < count; ++i) sum += exponential(x[begin + i] * scale - most);
    total += double(sum);
    if (parts != nullptr) parts[part] = double(sum);
  }
  return total;
}

// What `inference.sampling` draws of softmax(logits / temperature), or takes at temperature 0.
template <typename T>
INLINE Drawn draw_row(const Draw<T>& d) {
  const T most = largest_of(d.logits, d.size);
  if (d.temperature == 0) {
    const I64 token = std::find(d.logits, d.logits + d.size, most) - d.logits;
    const double plain = -std::log(exponentials(d.logits, d.size, T(1), most, static_cast<double*>(nullptr)));
    return {token, plain, plain};
  }
  const T scale = T(1 / d.temperature), top = most * scale;
  const double total = exponentials(d.logits, d.size, scale, top, d.parts), wanted = d.uniform * total;
  double passed = 0;
  I64 part = 0, token = -1;
  const I64 parts = (d.size + kPart - 1) / kPart;
  while (part < parts - 1 && passed + d.parts[part] <= wanted) passed += d.parts[part++];
  const I64 end = std::min(d.size, (part + 1) * kPart);
  auto counts = [&](I64 i) { return d.logits[i] * scale - top > T(sizeof(T) == 8 ? -740 : -87); };
  for (I64 i = part * kPart; i < end && token < 0; ++i)
    if (counts(i) && (passed += double(exponential(d.logits[i] * scale - top))) > wanted) token = i;
  if (token < 0)  // by rounding nothing is left: the last token before that can be drawn at all
    for (token = end - 1; token > 0 && !counts(token);) --token;
  const double policy = double(d.logits[token]) * double(scale) - double(top) - std::log(total);
  if (d.temperature == 1) return {token, policy, policy};
  const double whole = exponentials(d.logits, d.size, T(1), most, static_cast<double*>(nullptr));
  return {token, double(d.logits[token]) - double(most) - std::log(whole), policy};
}

template <typename T>
struct Kernels {
  int lanes;
  void (*product)(int, const Product<T>&);
  void (*norm)(int, const T*, const T*, T*, I64, I64, double);
  void (*swiglu)(const T*, T*, I64, I64);
  void (*attend)(const Attend<T>&);
  Drawn (*draw)(const Draw<T>&);
};

#define KERNELS(NAME, TARGET, T, LANES, R)                                                              \
  TARGET void NAME##_product(int vectors, const Product<T>& p) { product<T, LANES, R>(vectors, p); }    \
  TARGET void NAME##_norm(int vectors, const T* x, const T* w, T* out, I64 n, I64 size, double eps) {   \
    norm_panels<T, LANES>(vectors, x, w, out, n, size, eps);                                            \
  }                                                                                                     \
  TARGET void NAME##_swiglu(const T* x, T* out, I64 n, I64 size) { swiglu_rows(x, out, n, size); }      \
  TARGET void NAME##_attend(const Attend<T>& a) { attend_panels(a); }                                   \
  TARGET Drawn NAME##_draw(const Draw<T>& d) { return draw_row(d); }                                    \
  const Kernels<T> NAME##_kernels{LANES, NAME##_product, NAME##_norm, NAME##_swiglu, NAME##_attend, NAME##_draw};

#ifdef TARGETS
KERNELS(wide_float, V4, float, 16, 12)
KERNELS(wide_double, V4, double, 8, 12)
KERNELS(middle_float, V3, float, 8, 6)
KERNELS(middle_double, V3, double, 4, 6)
#endif
KERNELS(plain_float, , float, 4, 4)
KERNELS(plain_double, , double, 2, 4)

// Which of them this CPU runs; "" takes the widest.
template <typename T>
const Kernels<T>& kernels(const std::string& wanted) {
  constexpr bool twice = sizeof(T) == 8;
  auto pick = [](const auto& once, const auto& doubled) -> const Kernels<T>& {
    if constexpr (twice) return doubled;
    else return once;
  };
#ifdef TARGETS
  __builtin_cpu_init();
  const bool v4 = __builtin_cpu_supports("x86-64-v4"), v3 = __builtin_cpu_supports("x86-64-v3");
  if (v4 && (wanted.empty() || wanted == "v4")) return pick(wide_float_kernels, wide_double_kernels);
  if (v3 && (wanted.empty() || wanted == "v3")) return pick(middle_float_kernels, middle_double_kernels);
#endif
  return pick(plain_float_kernels, plain_double_kernels);
}

template <typename T>
struct Layer {
  const T *attention_norm, *q, *kv, *q_norm, *k_norm, *o, *mlp_norm, *gate_up, *down, *cos, *sin;
  T *keys, *values;
  I64 window;
};

using Address = std::uintptr_t;

// A pass: tokens or hidden rows in; hidden rows [rows, D] out, or with a head the logits [outputs, V] of some rows.
struct Pass {
  I64 rows, width, outputs;
  Address tokens, hidden, sequences, places, turns, table, chosen, out;
};

template <typename T>
class Stack {
 public:
  Stack(const py::dict& sizes, const py::list& layers, const py::dict& ends, const std::string& wanted)
      : kernels_(kernels<T>(wanted)) {
    auto number = [&](const char* name) { return sizes[name].cast<I64>(); };
    hidden_ = number("hidden"), heads_ = number("heads"), kv_heads_ = number("kv_heads"), size_ = number("size");
    ffn_ = number("ffn"), vocab_ = number("vocab"), positions_ = number("positions");
    eps_ = sizes["eps"].cast<double>();
    embedding_ = at<const T>(ends["embedding"].cast<Address>());
    final_norm_ = at<const T>(ends["final_norm"].cast<Address>());
    head_ = at<const T>(ends["head"].cast<Address>());
    for (const auto& each : layers) {
      const auto a = each.cast<std::vector<Address>>();
      if (a.size() != 14) throw std::invalid_argument("a layer has 13 addresses and a window");
      auto p = [&](int i) { return at<const T>(a[i]); };
      layers_.push_back({p(0), p(1), p(2), p(3), p(4), p(5), p(6), p(7), p(8), p(9), p(10), at<T>(a[11]), at<T>(a[12]),
                         static_cast<I64>(a[13])});
    }
  }

  void run(const Pass& pass) {
    chosen_.resize(pass.outputs * hidden_);
    for (I64 begin = 0; begin < pass.rows; begin += kRows) part(pass, begin, std::min(kRows, pass.rows - begin));
    if (head_ != nullptr && pass.outputs) logits(pass);
  }

 private:
  void multiply(const T* w, I64 n, I64 k, const T* x, T* y, bool add) {
    kernels_.product(vectors_, {w, n, k, x, y, panels_, n, add});
  }

  void shape(I64 rows) {
    vectors_ = rows <= kFew ? 0 : rows <= kernels_.lanes ? 1 : 2;
    lanes_ = vectors_ ? vectors_ * kernels_.lanes : 1;
    panels_ = (rows + lanes_ - 1) / lanes_;
    const I64 all = panels_ * lanes_;
    x_.resize(all * hidden_), normed_.resize(all * std::max(hidden_, heads_ * size_)), some_.resize(all * kVocab);
    q_.resize(all * heads_ * size_), kv_.resize(all * 2 * kv_heads_ * size_);
    both_.resize(all * 2 * ffn_), inner_.resize(all * ffn_);
  }

  // All layers of rows `begin` to `begin + rows`: what stands before them in their sequences is cached.
  void part(const Pass& pass, I64 begin, I64 rows) {
    const I64* tokens = at<const I64>(pass.tokens);
    shape(rows);
    head_room_.resize(3 * size_), weights_.resize(pass.width * kBlock);
    enter(rows, [&](I64 row) {
      if (tokens != nullptr) return embedding_ + tokens[begin + row] * hidden_;
      return at<const T>(pass.hidden) + (begin + row) * hidden_;
    });
    for (const Layer<T>& layer : layers_) block(layer, pass, begin, rows);
    if (head_ == nullptr)
      for (I64 row = 0; row < rows; ++row) leave(row, at<T>(pass.out) + (begin + row) * hidden_);
    const I64* chosen = at<const I64>(pass.chosen);
    for (I64 i = 0; i < pass.outputs; ++i)
      if (chosen[i] >= begin && chosen[i] < begin + rows) leave(chosen[i] - begin, chosen_.data() + i * hidden_);
  }

  // Rows [D] into panels; what is behind the last row is 0.
  template <typename F>
  void enter(I64 rows, F&& row_at) {
    if (lanes_ > 1) std::fill(x_.begin() + (panels_ - 1) * lanes_ * hidden_, x_.end(), T(0));
    for (I64 row = 0; row < rows; ++row) {
      const T* from = row_at(row);
      T* to = x_.data() + row / lanes_ * lanes_ * hidden_ + row % lanes_;
      for (I64 i = 0; i < hidden_; ++i) to[i * lanes_] = from[i];
    }
  }

  void leave(I64 row, T* out) const {
    const T* from = x_.data() + row / lanes_ * lanes_ * hidden_ + row % lanes_;
    for (I64 i = 0; i < hidden_; ++i) out[i] = from[i * lanes_];
  }

  void block(const Layer<T>& layer, const Pass& pass, I64 begin, I64 rows) {
    const I64 inner = heads_ * size_;
    T *x = x_.data(), *normed = normed_.data();
    kernels_.norm(vectors_, x, layer.attention_norm, normed, panels_, hidden_, eps_);
    multiply(layer.q, inner, hidden_, normed, q_.data(), false);
    multiply(layer.kv, 2 * kv_heads_ * size_, hidden_, normed, kv_.data(), false);
    kernels_.attend({q_.data(), kv_.data(), layer.q_norm, layer.k_norm, layer.cos, layer.sin, layer.keys, layer.values,
                     normed, at<const I64>(pass.sequences) + begin, at<const I64>(pass.places) + begin,
                     at<const I64>(pass.turns) + begin, at<const I64>(pass.table), rows, heads_, kv_heads_, size_, pass.width, positions_,
                     layer.window, lanes_, eps_, head_room_.data(), weights_.data()});
    multiply(layer.o, hidden_, inner, normed, x, true);
    kernels_.norm(vectors_, x, layer.mlp_norm, normed, panels_, hidden_, eps_);
    multiply(layer.gate_up, 2 * ffn_, hidden_, normed, both_.data(), false);
    kernels_.swiglu(both_.data(), inner_.data(), panels_, ffn_ * lanes_);
    multiply(layer.down, hidden_, ffn_, inner_.data(), x, true);
  }

  // Logits [outputs, V] of the chosen rows.
  void logits(const Pass& pass) {
    const I64 count = pass.outputs;
    shape(count);
    enter(count, [&](I64 row) { return chosen_.data() + row * hidden_; });
    kernels_.norm(vectors_, x_.data(), final_norm_, normed_.data(), panels_, hidden_, eps_);
    T* out = at<T>(pass.out);
    for (I64 begin = 0; begin < vocab_; begin += kVocab) {
      const I64 n = std::min(kVocab, vocab_ - begin);
      multiply(head_ + begin * hidden_, n, hidden_, normed_.data(), some_.data(), false);
      for (I64 row = 0; row < count; ++row) {
        const T* from = some_.data() + row / lanes_ * lanes_ * n + row % lanes_;
        for (I64 i = 0; i < n; ++i) out[row * vocab_ + begin + i] = from[i * lanes_];
      }
    }
  }

  const Kernels<T>& kernels_;
  std::vector<Layer<T>> layers_;
  I64 hidden_, heads_, kv_heads_, size_, ffn_, vocab_, positions_, lanes_ = 1, panels_ = 0;
  int vectors_ = 0;
  double eps_;
  const T *embedding_, *final_norm_, *head_;
  std::vector<T> x_, normed_, q_, kv_, both_, inner_, head_room_, weights_, chosen_, some_;
};

// numbers: rows, width, outputs; addresses: those of Pass in their order.
template <typename T>
void run_stack(Stack<T>& stack, const std::vector<I64>& numbers, const std::vector<Address>& a) {
  if (numbers.size() != 3 || a.size() != 8) throw std::invalid_argument("3 numbers and 8 addresses are expected");
  stack.run({numbers[0], numbers[1], numbers[2], a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]});
}

// logits [rows, V], uniform [rows] (0: none) -> out [3, rows]: token, its log-probability plain and at the temperature.
template <typename T>
void draw_rows(Address logits, Address uniform, Address out, I64 rows, I64 size, double temperature) {
  const Kernels<T>& found = kernels<T>("");
  std::vector<double> parts((size + kPart - 1) / kPart);
  const double* numbers = at<const double>(uniform);
  double* to = at<double>(out);
  for (I64 row = 0; row < rows; ++row) {
    const double number = numbers == nullptr ? 0 : numbers[row];
    const Drawn drawn = found.draw({at<const T>(logits) + row * size, size, temperature, number, parts.data()});
    to[row] = double(drawn.token), to[rows + row] = drawn.plain, to[2 * rows + row] = drawn.policy;
  }
}

void draw(Address logits, Address uniform, Address out, I64 rows, I64 size, double temperature, bool twice) {
  (twice ? draw_rows<double> : draw_rows<float>)(logits, uniform, out, rows, size, temperature);
}

template <typename T>
void bind_one(py::module_& m, const char* name) {
  py::class_<Stack<T>>(m, name)
      .def(py::init<const py::dict&, const py::list&, const py::dict&, const std::string&>())
      .def("run", &run_stack<T>);
}

}  // namespace

void bind_stack(py::module_& m) {
  bind_one<float>(m, "FloatStack");
  bind_one<double>(m, "DoubleStack");
  m.def("draw", &draw);
}
