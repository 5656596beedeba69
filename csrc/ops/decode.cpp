// One step of decoding between the matrix multiplies of a plain block, on a CPU: RMSNorm; rotary embedding, cache
// write and attention to the blocks of a paged cache where they lie; SwiGLU. The twin: megallm/models/decode.py, whose
// results these are to rounding. Tensors come as addresses: nothing here depends on a version of torch.

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <vector>

#include "decode.hpp"

namespace py = pybind11;

void bind_stack(py::module_& m);  // decode_stack.cpp

namespace {

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
      const I64 pool = head / group * at.positions * size;
      rotate(q + (row * at.heads + head) * size, cos + row * half, sin + row * half, turned.data(), half, scale);
      attend_row(turned.data(), keys + pool, values + pool, blocks, first, end, size, weights.data(),
                 out + (row * at.heads + head) * size);
    }
  }
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
  m.attr("VERSION") = 5;  // must equal that of megallm/base/extension.py
  m.attr("BLOCK") = kBlock;
  m.def("norm", &norm);
  m.def("swiglu", &swiglu);
  m.def("attend", &attend);
  megallm::add_kernels(m);
  bind_stack(m);
}
