// Chooses the kernels of the best instruction set that this CPU has, divides their work among threads, and shows them to
// Python (megallm/ops/native.py). Tensors come as addresses and strides: nothing here depends on a version of torch.

#include "kernels.hpp"

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace py = pybind11;

namespace megallm {

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Floats = std::unique_ptr<float, Free>;

static Floats floats(I64 count) {
  void* made = std::aligned_alloc(64, (std::max<I64>(count, 1) * sizeof(float) + 63) / 64 * 64);
  if (!made) throw std::bad_alloc();
  return Floats(static_cast<float*>(made));
}

float* scratch_of(I64 count) {
  static thread_local Floats mine;
  static thread_local I64 room = 0;
  if (room < count) {
    mine = floats(count);
    room = count;
  }
  return mine.get();
}

namespace {

const Kernels* chosen = nullptr;

const Kernels* table_of(const std::string& name) {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (name == "avx512") return avx512 ? avx512_kernels() : nullptr;
  if (name == "avx2") return avx2 ? avx2_kernels() : nullptr;
#endif
  return name == "portable" ? portable_kernels() : nullptr;
}

// By name, or the best there is; "reference": none, everything is left to torch.
std::string use(const std::string& name) {
  if (name == "reference") {
    chosen = nullptr;
    return name;
  }
  for (const char* one : {"avx512", "avx2", "portable"})
    if (name == one || name == "auto")
      if (const Kernels* found = table_of(one)) {
        chosen = found;
        return one;
      }
  throw std::invalid_argument("This build or CPU has no kernels called '" + name + "'.");
}

std::string isa() { return chosen ? chosen->name : "reference"; }

// Whether `product` outruns what torch multiplies fp32 with: MKL takes its AVX2 path on CPUs that are not Intel's.
bool outruns_blas() {
#if defined(__x86_64__) && defined(__GNUC__)
  return chosen && chosen != portable_kernels() && __builtin_cpu_is("amd");
#else
  return false;
#endif
}

const Kernels& kernels() {
  if (!chosen) throw std::logic_error("The kernels are switched off.");
  return *chosen;
}

int num_threads() {
#ifdef _OPENMP
  return omp_in_parallel() ? 1 : omp_get_max_threads();  // torch sets it for its own threads, which these are
#else
  return 1;
#endif
}

// work(begin, end) over `items`, each call at least `grain` of them.
template <typename Work>
void divide(I64 items, I64 grain, Work&& work) {
  const I64 parts = std::min<I64>(num_threads(), (items + grain - 1) / std::max<I64>(grain, 1));
  if (parts <= 1) {
    if (items > 0) work(0, items);
    return;
  }
#ifdef _OPENMP
#pragma omp parallel for num_threads(static_cast<int>(parts)) schedule(static, 1)
#endif
  for (I64 part = 0; part < parts; ++part) work(items * part / parts, items * (part + 1) / parts);
}

// The same for items whose work differs: taken one by one, in the order of their numbers.
template <typename Work>
void share_out(I64 items, Work&& work) {
  const int threads = static_cast<int>(std::min<I64>(num_threads(), items));
  if (threads <= 1) {
    if (items > 0) work(0, items);
    return;
  }
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
#endif
  for (I64 item = 0; item < items; ++item) work(item, item + 1);
}

using Address = std::uintptr_t;
template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

Strided strided(const py::handle& described) {  // (address, strides of batch, token and head, half)
  const auto t = described.cast<py::tuple>();
  return Strided{at<char>(t[0].cast<Address>()), t[1].cast<I64>(), t[2].cast<I64>(), t[3].cast<I64>(), t[4].cast<bool>()};
}

// sizes: batch, q_tokens, k_tokens, heads, kv_heads, size, value_size.
Attention attention_of(const py::tuple& sizes, float scale, Address tiles, I64 num_tiles) {
  if (sizes.size() != 7) throw std::invalid_argument("7 sizes are expected");
  I64 s[7];
  for (int i = 0; i < 7; ++i) s[i] = sizes[i].cast<I64>();
  if (s[4] <= 0 || s[3] % s[4] || s[5] > 4096 || s[6] > 4096) throw std::invalid_argument("heads or sizes are not supported");
  Attention a{};
  a.batch = s[0], a.q_tokens = s[1], a.k_tokens = s[2], a.heads = s[3], a.kv_heads = s[4], a.size = s[5], a.value_size = s[6];
  a.scale = scale, a.tiles = at<const Tile>(tiles), a.num_tiles = num_tiles;
  for (I64 n = 0; n < num_tiles; ++n) {
    const Tile& t = a.tiles[n];
    if (t.q_begin < 0 || t.q_end > a.q_tokens || t.k_begin < 0 || t.k_end > a.k_tokens || t.low >= t.high)
      throw std::invalid_argument("a tile lies outside of the tensors");
  }
  return a;
}

I64 padded(I64 size) { return (size + kernels().width - 1) / kernels().width * kernels().width; }
I64 key_blocks(const Attention& a) { return (a.k_tokens + kernels().key_block - 1) / kernels().key_block; }

void attention_forward(const py::tuple& sizes, float scale, Address tiles, I64 num_tiles, const py::tuple& tensors, Address lse) {
  Attention a = attention_of(sizes, scale, tiles, num_tiles);
  a.q = strided(tensors[0]), a.k = strided(tensors[1]), a.v = strided(tensors[2]), a.out = strided(tensors[3]);
  a.lse = at<float>(lse);
  const py::gil_scoped_release released;
  const I64 heads = a.batch * a.kv_heads * key_blocks(a), keys = heads * kernels().key_block;
  const Floats keys_t = floats(keys * a.size), values = floats(keys * padded(a.value_size));
  a.keys_t = keys_t.get(), a.values = values.get();
  divide(heads, 1, [&](I64 begin, I64 end) { kernels().pack_keys(a, false, begin, end); });
  const I64 parts = (a.q_tokens + kernels().row_blocks - 1) / kernels().row_blocks;
  share_out(a.batch * a.heads * parts, [&](I64 begin, I64 end) { kernels().attention_forward(a, begin, end); });
}

void attention_backward(const py::tuple& sizes, float scale, Address tiles, I64 num_tiles, const py::tuple& tensors, Address lse,
                        const py::tuple& grads) {
  Attention a = attention_of(sizes, scale, tiles, num_tiles);
  a.q = strided(tensors[0]), a.k = strided(tensors[1]), a.v = strided(tensors[2]);
  a.out = strided(tensors[3]), a.grad = strided(tensors[4]);
  a.lse = at<float>(lse);
  a.grad_q = at<float>(grads[0].cast<Address>()), a.grad_k = at<float>(grads[1].cast<Address>());
  a.grad_v = at<float>(grads[2].cast<Address>());
  const py::gil_scoped_release released;
  const I64 heads = a.batch * a.kv_heads, blocks = key_blocks(a), keys = heads * blocks * kernels().key_block;
  const I64 rows = a.batch * a.heads * a.q_tokens, size = padded(a.size), value = padded(a.value_size);
  a.chunks = std::max<I64>(1, std::min<I64>((num_threads() + heads - 1) / std::max<I64>(heads, 1), blocks));
  const I64 sums = a.batch * a.q_tokens * a.heads * a.size;
  const Floats keys_t = floats(keys * a.size), packed = floats(keys * size), values_t = floats(keys * a.value_size);
  const Floats queries = floats(rows * size), given = floats(rows * value), deltas = floats(rows);
  const Floats sums_q = floats((a.chunks - 1) * sums);
  a.keys_t = keys_t.get(), a.keys = packed.get(), a.values_t = values_t.get(), a.queries = queries.get(), a.grads = given.get();
  a.deltas = deltas.get(), a.sums_q = sums_q.get();
  std::fill(a.sums_q, a.sums_q + (a.chunks - 1) * sums, 0.0f);
  divide(heads * blocks, 1, [&](I64 begin, I64 end) { kernels().pack_keys(a, true, begin, end); });
  divide(a.batch * a.heads, 1, [&](I64 begin, I64 end) { kernels().pack_queries(a, begin, end); });
  share_out(a.chunks * heads, [&](I64 begin, I64 end) { kernels().attention_backward(a, begin, end); });
  for (I64 chunk = 0; chunk + 1 < a.chunks; ++chunk) {
    const float* from = a.sums_q + chunk * sums;
    divide(sums, 1 << 14, [&](I64 begin, I64 end) {
      for (I64 i = begin; i < end; ++i) a.grad_q[i] += from[i];
    });
  }
}

I64 grain(I64 size) { return std::max<I64>(1, (1 << 14) / std::max<I64>(size, 1)); }

void rms_norm(I64 rows, I64 size, bool half, Address x, Address weight, bool half_weight, float eps, Address out, Address scale) {
  const py::gil_scoped_release released;
  const Rows shape{rows, size, half};
  divide(rows, grain(size), [&](I64 begin, I64 end) {
    kernels().rms_norm(shape, at<void>(x), at<void>(weight), half_weight, eps, at<void>(out), at<float>(scale), begin, end);
  });
}

void rms_norm_backward(I64 rows, I64 size, bool half, Address grad, Address x, Address weight, bool half_weight, Address scale,
                       Address out, Address grad_weight) {
  const py::gil_scoped_release released;
  const Rows shape{rows, size, half};
  const I64 step = grain(size), parts = std::max<I64>(1, std::min<I64>(num_threads(), (rows + step - 1) / step));
  const Floats sums = floats(parts * size);
  std::fill(sums.get(), sums.get() + parts * size, 0.0f);
  divide(parts, 1, [&](I64 begin, I64 end) {
    for (I64 part = begin; part < end; ++part)
      kernels().rms_norm_backward(shape, at<void>(grad), at<void>(x), at<void>(weight), half_weight, at<float>(scale),
                                  at<void>(out), sums.get() + part * size, rows * part / parts, rows * (part + 1) / parts);
  });
  float* to = at<float>(grad_weight);
  for (I64 i = 0; i < size; ++i) {
    to[i] = 0;
    for (I64 part = 0; part < parts; ++part) to[i] += sums.get()[part * size + i];
  }
}

void swiglu(I64 rows, I64 size, bool half, Address both, Address out) {
  const py::gil_scoped_release released;
  const Rows shape{rows, size, half};
  divide(rows, grain(size), [&](I64 begin, I64 end) { kernels().swiglu(shape, at<void>(both), at<void>(out), begin, end); });
}

void swiglu_backward(I64 rows, I64 size, bool half, Address grad, Address both, Address out) {
  const py::gil_scoped_release released;
  const Rows shape{rows, size, half};
  divide(rows, grain(size), [&](I64 begin, I64 end) {
    kernels().swiglu_backward(shape, at<void>(grad), at<void>(both), at<void>(out), begin, end);
  });
}

// sizes: batch, tokens, heads, size, half of what is rotated.
void rope(const py::tuple& x, const py::tuple& sizes, Address cos, Address sin, Address out, float sign) {
  const Strided from = strided(x);
  const I64 batch = sizes[0].cast<I64>(), tokens = sizes[1].cast<I64>(), heads = sizes[2].cast<I64>();
  const I64 size = sizes[3].cast<I64>(), half = sizes[4].cast<I64>();
  const py::gil_scoped_release released;
  divide(batch * tokens, grain(heads * size), [&](I64 begin, I64 end) {
    kernels().rope(from, at<float>(cos), at<float>(sin), at<void>(out), tokens, heads, size, half, sign, begin, end);
  });
}

// results: top, total, label, moment and best (0: not wanted).
void softmax_statistics(I64 rows, I64 size, bool half, Address logits, const py::tuple& targets, const py::tuple& results) {
  const Softmax shape{at<const I64>(targets[0].cast<Address>()), targets[1].cast<I64>(), targets[2].cast<float>(), half, false};
  Address to[5];
  for (int i = 0; i < 5; ++i) to[i] = results[i].cast<Address>();
  const py::gil_scoped_release released;
  divide(rows, grain(size), [&](I64 begin, I64 end) {
    kernels().softmax_statistics(shape, size, at<void>(logits), at<float>(to[0]), at<float>(to[1]), at<float>(to[2]),
                                 at<float>(to[3]), at<I64>(to[4]), begin, end);
  });
}

// given: lse, entropy, of_log_prob, of_entropy (0: none), at_label.
void softmax_gradient(I64 rows, I64 size, bool half, Address logits, const py::tuple& targets, const py::tuple& given,
                      Address out, bool half_out) {
  const Softmax shape{at<const I64>(targets[0].cast<Address>()), targets[1].cast<I64>(), targets[2].cast<float>(), half, half_out};
  Address from[5];
  for (int i = 0; i < 5; ++i) from[i] = given[i].cast<Address>();
  const py::gil_scoped_release released;
  divide(rows, grain(size), [&](I64 begin, I64 end) {
    kernels().softmax_gradient(shape, size, at<void>(logits), at<float>(from[0]), at<float>(from[1]), at<float>(from[2]),
                               at<float>(from[3]), at<float>(from[4]), at<void>(out), begin, end);
  });
}

// matrices: address, stride of rows and of columns, for A and B; sizes: rows, columns, depth; C is contiguous.
void product(const py::tuple& sizes, const py::tuple& a, const py::tuple& b, Address c, bool add) {
  Product p{at<const float>(a[0].cast<Address>()), at<const float>(b[0].cast<Address>()), at<float>(c)};
  p.rows = sizes[0].cast<I64>(), p.columns = sizes[1].cast<I64>(), p.depth = sizes[2].cast<I64>();
  p.a_row = a[1].cast<I64>(), p.a_column = a[2].cast<I64>(), p.b_row = b[1].cast<I64>(), p.b_column = b[2].cast<I64>();
  p.ldc = p.columns, p.add = add;
  const py::gil_scoped_release released;
  const I64 work = p.rows * p.columns * p.depth, threads = std::min<I64>(num_threads(), work / (1 << 18) + 1);
  const bool down = p.rows >= p.columns;  // what is divided, by whole panels of any instruction set
  const I64 whole = down ? p.rows : p.columns, step = (whole / threads + 95) / 96 * 96, parts = (whole + step - 1) / std::max<I64>(step, 1);
  divide(parts, 1, [&](I64 begin, I64 end) {
    const I64 low = begin * step, high = std::min(end * step, whole);
    if (down)
      kernels().product(p, low, high, 0, p.columns);
    else
      kernels().product(p, 0, p.rows, low, high);
  });
}

}  // namespace

void add_kernels(py::module_& m) {
  const char* wanted = std::getenv("MEGALLM_OPS_ISA");
  use(wanted && *wanted ? wanted : "auto");
  m.def("use", &use);
  m.def("isa", &isa);
  m.def("outruns_blas", &outruns_blas);
  m.def("num_threads", &num_threads);
  m.def("attention_forward", &attention_forward);
  m.def("attention_backward", &attention_backward);
  m.def("rms_norm", &rms_norm);
  m.def("rms_norm_backward", &rms_norm_backward);
  m.def("swiglu_forward", &swiglu);
  m.def("swiglu_backward", &swiglu_backward);
  m.def("rope", &rope);
  m.def("softmax_statistics", &softmax_statistics);
  m.def("softmax_gradient", &softmax_gradient);
  m.def("product", &product);
}

}  // namespace megallm
