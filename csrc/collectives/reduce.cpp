#include "reduce.hpp"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define WIDE __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define INLINE inline __attribute__((always_inline))
#else
#define WIDE
#define INLINE inline
#endif

namespace collectives {
namespace {

constexpr std::size_t kBlock = 1024;  // elements whose running result stays in the first cache

struct Bf16 {
  std::uint16_t bits;
};
struct F16 {
  std::uint16_t bits;
};
struct Bool {
  std::uint8_t bits;
};

INLINE float floating(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
INLINE std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

INLINE float load(Bf16 x) { return floating(static_cast<std::uint32_t>(x.bits) << 16); }
INLINE void store(Bf16& to, float x) {
  const std::uint32_t bits = bits_of(x);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const std::uint32_t nan = (bits >> 16) | 0x40u;  // rounding could make an infinity of it
  to.bits = static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

INLINE float load(F16 x) {
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
  const std::uint32_t rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return floating(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  // As fp32 with a small exponent, normal or not, times 2^112.
  return floating(sign | bits_of(floating(rest << 13) * floating(0x77800000u)));
}
INLINE void store(F16& to, float x) {
  const std::uint32_t bits = bits_of(x), sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
  std::uint32_t out;
  if (rest > 0x7f800000u) {
    out = 0x7e00u;
  } else if (rest >= 0x477ff000u) {  // rounds to 2^16 or more
    out = 0x7c00u;
  } else if (rest >= 0x38800000u) {
    out = (rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13;
  } else {  // below 2^-14: the sum leaves the multiple of 2^-24 in the lowest bits, rounded to even
    out = bits_of(floating(rest) + 0.5f) - bits_of(0.5f);
  }
  to.bits = static_cast<std::uint16_t>(sign | out);
}

INLINE std::uint8_t load(Bool x) { return x.bits != 0; }
INLINE void store(Bool& to, std::uint8_t x) { to.bits = x != 0; }

template <typename T>
INLINE T load(T x) {
  return x;
}
template <typename T>
INLINE void store(T& to, T x) {
  to = x;
}

struct Sum {
  template <typename A>
  INLINE A operator()(A a, A b) const {
    if constexpr (std::is_integral_v<A>) {  // wraps around, as torch does
      using U = std::make_unsigned_t<A>;
      return static_cast<A>(static_cast<U>(a) + static_cast<U>(b));
    } else {
      return a + b;
    }
  }
};
struct Product {
  template <typename A>
  INLINE A operator()(A a, A b) const {
    if constexpr (std::is_integral_v<A>) {
      return static_cast<A>(static_cast<std::uint64_t>(a) * static_cast<std::uint64_t>(b));
    } else {
      return a * b;
    }
  }
};
struct Max {
  template <typename A>
  INLINE A operator()(A a, A b) const { return a != a || a > b ? a : b; }
};
struct Min {
  template <typename A>
  INLINE A operator()(A a, A b) const { return a != a || a < b ? a : b; }
};

template <typename T, typename F>
INLINE void fold(const T* const* in, int ranks, T* out, T* also, std::size_t count, F f, bool average) {
  using A = decltype(load(T{}));
  A total[kBlock];
  for (std::size_t at = 0; at < count; at += kBlock) {
    const std::size_t n = std::min(kBlock, count - at);
    for (std::size_t i = 0; i < n; ++i) total[i] = load(in[0][at + i]);
    for (int rank = 1; rank < ranks; ++rank) {
      const T* x = in[rank] + at;
      for (std::size_t i = 0; i < n; ++i) total[i] = f(total[i], load(x[i]));
    }
    if constexpr (std::is_floating_point_v<A>) {
      if (average)
        for (std::size_t i = 0; i < n; ++i) total[i] /= static_cast<A>(ranks);
    }
    for (std::size_t i = 0; i < n; ++i) store(out[at + i], total[i]);
    if (also) std::memcpy(also + at, out + at, n * sizeof(T));
  }
}

template <typename T>
INLINE void by_op(Op op, const void* const* in, int ranks, void* out, void* also, std::size_t count) {
  const T* const* from = reinterpret_cast<const T* const*>(in);
  T *to = static_cast<T*>(out), *copy = static_cast<T*>(also);
  using A = decltype(load(T{}));
  if (op == Op::avg && !std::is_floating_point_v<A>) throw std::invalid_argument("integers have no average");
  const bool whole = std::is_same_v<T, Bool>;  // the sum of truths is whether any holds
  switch (op) {
    case Op::sum:
      if (whole) return fold(from, ranks, to, copy, count, Max{}, false);
      return fold(from, ranks, to, copy, count, Sum{}, false);
    case Op::avg: return fold(from, ranks, to, copy, count, Sum{}, true);
    case Op::max: return fold(from, ranks, to, copy, count, Max{}, false);
    case Op::min: return fold(from, ranks, to, copy, count, Min{}, false);
    case Op::product: return fold(from, ranks, to, copy, count, Product{}, false);
  }
}

#define OF_TYPE(name, T)                                                                                            \
  WIDE void name(Op op, const void* const* in, int ranks, void* out, void* also, std::size_t count) {                \
    by_op<T>(op, in, ranks, out, also, count);                                                                       \
  }
OF_TYPE(of_f32, float)
OF_TYPE(of_f64, double)
OF_TYPE(of_bf16, Bf16)
OF_TYPE(of_f16, F16)
OF_TYPE(of_i64, std::int64_t)
OF_TYPE(of_i32, std::int32_t)
OF_TYPE(of_i16, std::int16_t)
OF_TYPE(of_i8, std::int8_t)
OF_TYPE(of_u8, std::uint8_t)
OF_TYPE(of_bool, Bool)

using Reduce = void (*)(Op, const void* const*, int, void*, void*, std::size_t);
struct Row {
  std::size_t width;
  Reduce reduce;
};
const Row kTypes[] = {{4, of_f32}, {8, of_f64}, {2, of_bf16}, {2, of_f16}, {8, of_i64},
                      {4, of_i32}, {2, of_i16}, {1, of_i8},   {1, of_u8},  {1, of_bool}};

}  // namespace

std::size_t width(Type type) { return kTypes[static_cast<int>(type)].width; }

void reduce(Type type, Op op, const void* const* in, int ranks, void* out, void* also, std::size_t count) {
  kTypes[static_cast<int>(type)].reduce(op, in, ranks, out, also, count);
}

}  // namespace collectives
