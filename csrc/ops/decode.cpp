// One step of decoding between the matrix multiplies of a plain block, on a CPU: RMSNorm; rotary embedding, cache
// write and attention to the blocks of a paged cache where they lie; SwiGLU. The twin: megallm/models/decode.py, whose
// results these are to rounding. Tensors come as addresses: nothing here depends on a version of torch.

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define WIDE __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define INLINE inline __attribute__((always_inline))
#else
#define WIDE
#define INLINE inline
#endif

namespace py = pybind11;

namespace {

using I64 = std::int64_t;

constexpr I64 kBlock = 16;  // positions of a block: BLOCK of megallm/inference/blocks.py

INLINE double exponential(double x) { return std::exp(x); }

// e^x to a rounding or two, in a form that compilers vectorise: 2^n p(r) with |r| <= log(2) / 2 (Cephes).
INLINE float exponential(float x) {
  x = std::min(std::max(x, -87.0f), 88.0f);
  const float n = std::floor(x * 1.44269504088896341f + 0.5f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const std::int32_t bits = (static_cast<std::int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

template <typename T>
INLINE void norm_rows(const T* x, const T* weight, T* out, I64 rows, I64 size, double eps) {
  for (I64 row = 0; row < rows; ++row, x += size, out += size) {
    T squares = 0;
    for (I64 i = 0; i < size; ++i) squares += x[i] * x[i];
    const T scale = T(1) / std::sqrt(squares / T(size) + T(eps));
    for (I64 i = 0; i < size; ++i) out[i] = x[i] * scale * weight[i];
  }
}

template <typename T>
INLINE void swiglu_rows(const T* both, T* out, I64 rows, I64 size) {
  for (I64 row = 0; row < rows; ++row, both += 2 * size, out += size)
    for (I64 i = 0; i < size; ++i) out[i] = both[i] / (T(1) + exponential(-both[i])) * both[size + i];
}

template <typename T>
INLINE void rotate(const T* x, const T* cos, const T* sin, T* out, I64 half, T scale) {
  for (I64 i = 0; i < half; ++i) {
    out[i] = (x[i] * cos[i] - x[half + i] * sin[i]) * scale;
    out[half + i] = (x[half + i] * cos[i] + x[i] * sin[i]) * scale;
  }
}

struct Shape {
  I64 rows, heads, kv_heads, size, width, positions, window;
};

// q [rows, heads, size], kv [rows, 2, kv_heads, size], cos and sin [rows, size / 2], pools [kv_heads, positions, size],
// table [rows, width], lengths [rows] -> out [rows, heads, size]. A row sees its own new position and those before it,
// of `window` (0: all).
template <typename T>
INLINE void attend_rows(const T* q, const T* kv, const T* cos, const T* sin, T* keys, T* values, const I64* table,
                        const I64* lengths, T* out, const Shape& at) {
  const I64 half = at.size / 2, group = at.heads / at.kv_heads, size = at.size;
  const T scale = T(1) / std::sqrt(T(size));
  for (I64 row = 0; row < at.rows; ++row) {
    const I64 last = lengths[row], place = table[row * at.width + last / kBlock] * kBlock + last % kBlock;
    for (I64 head = 0; head < at.kv_heads; ++head) {
      const T* k = kv + (row * 2 * at.kv_heads + head) * size;
      const I64 to = (head * at.positions + place) * size;
      rotate(k, cos + row * half, sin + row * half, keys + to, half, T(1));
      std::memcpy(values + to, k + at.kv_heads * size, size * sizeof(T));
    }
  }
  std::vector<T> turned(size), weights(at.width * kBlock);
  for (I64 row = 0; row < at.rows; ++row) {
    const I64 end = lengths[row] + 1, first = at.window ? std::max<I64>(end - at.window, 0) : 0;
    const I64* blocks = table + row * at.width;
    for (I64 head = 0; head < at.heads; ++head) {
      const I64 pool = head / group * at.positions;
      rotate(q + (row * at.heads + head) * size, cos + row * half, sin + row * half, turned.data(), half, scale);
      T* weight = weights.data();
      T largest = -std::numeric_limits<T>::infinity();
      for (I64 begin = first; begin < end;) {
        const I64 stop = std::min(end, (begin / kBlock + 1) * kBlock);
        const T* key = keys + (pool + blocks[begin / kBlock] * kBlock + begin % kBlock) * size;
        for (I64 i = begin; i < stop; ++i, key += size) {
          T sum = 0;
          for (I64 j = 0; j < size; ++j) sum += turned[j] * key[j];
          weight[i - first] = sum;
          largest = std::max(largest, sum);
        }
        begin = stop;
      }
      T total = 0;
      for (I64 i = 0; i < end - first; ++i) {
        weight[i] = exponential(weight[i] - largest);
        total += weight[i];
      }
      T* result = out + (row * at.heads + head) * size;
      std::fill(result, result + size, T(0));
      for (I64 begin = first; begin < end;) {
        const I64 stop = std::min(end, (begin / kBlock + 1) * kBlock);
        const T* value = values + (pool + blocks[begin / kBlock] * kBlock + begin % kBlock) * size;
        for (I64 i = begin; i < stop; ++i, value += size)
          for (I64 j = 0; j < size; ++j) result[j] += weight[i - first] * value[j];
        begin = stop;
      }
      for (I64 j = 0; j < size; ++j) result[j] /= total;
    }
  }
}

template <typename T>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

#define BOTH(NAME, PARAMETERS, ARGUMENTS)                               \
  WIDE void NAME##_float PARAMETERS(float) { NAME ARGUMENTS; }          \
  WIDE void NAME##_double PARAMETERS(double) { NAME ARGUMENTS; }

#define NORM(T) (const T* x, const T* weight, T* out, I64 rows, I64 size, double eps)
#define SWIGLU(T) (const T* both, T* out, I64 rows, I64 size)
#define ATTEND(T)                                                                                                  \
  (const T* q, const T* kv, const T* cos, const T* sin, T* keys, T* values, const I64* table, const I64* lengths, T* out, \
   const Shape& shape)
BOTH(norm_rows, NORM, (x, weight, out, rows, size, eps))
BOTH(swiglu_rows, SWIGLU, (both, out, rows, size))
BOTH(attend_rows, ATTEND, (q, kv, cos, sin, keys, values, table, lengths, out, shape))

using Address = std::uintptr_t;

void norm(Address x, Address weight, Address out, I64 rows, I64 size, double eps, bool twice) {
  if (twice) return norm_rows_double(at<double>(x), at<double>(weight), at<double>(out), rows, size, eps);
  norm_rows_float(at<float>(x), at<float>(weight), at<float>(out), rows, size, eps);
}

void swiglu(Address both, Address out, I64 rows, I64 size, bool twice) {
  if (twice) return swiglu_rows_double(at<double>(both), at<double>(out), rows, size);
  swiglu_rows_float(at<float>(both), at<float>(out), rows, size);
}

template <typename T, typename F>
void attend_with(F&& run, const py::tuple& a, const Shape& shape) {
  auto p = [&](int i) { return at<T>(a[i].cast<Address>()); };
  auto n = [&](int i) { return at<const I64>(a[i].cast<Address>()); };
  run(p(0), p(1), p(2), p(3), p(4), p(5), n(6), n(7), p(8), shape);
}

// addresses: q, kv, cos, sin, keys, values, table, lengths, out; sizes: those of Shape.
void attend(const py::tuple& addresses, const py::tuple& sizes, bool twice) {
  if (addresses.size() != 9 || sizes.size() != 7) throw std::invalid_argument("9 addresses and 7 sizes are expected");
  I64 s[7];
  for (int i = 0; i < 7; ++i) s[i] = sizes[i].cast<I64>();
  const Shape shape{s[0], s[1], s[2], s[3], s[4], s[5], s[6]};
  if (twice) return attend_with<double>(attend_rows_double, addresses, shape);
  attend_with<float>(attend_rows_float, addresses, shape);
}

}  // namespace

namespace megallm {
void add_kernels(py::module_& m);  // kernels.cpp
}

PYBIND11_MODULE(_ops, m) {
  m.attr("VERSION") = 2;  // must equal that of megallm/base/extension.py
  m.attr("BLOCK") = kBlock;
  m.def("norm", &norm);
  m.def("swiglu", &swiglu);
  m.def("attend", &attend);
  megallm::add_kernels(m);
}
