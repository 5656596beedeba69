// Numbers of 16 and 8 bits, 16-byte loads and stores, and sums over warps and blocks. Kernels compute in float.
#pragma once

#include "device.cuh"

struct Bf16 {
  std::uint16_t bits;
};
struct F16 {
  std::uint16_t bits;
};
struct E4m3 {
  std::uint8_t bits;
  static constexpr float kLargest = 448.0f;
};
struct E5m2 {
  std::uint8_t bits;
  static constexpr float kLargest = 57344.0f;
};

// Rounds to the nearest number of MANTISSA bits and an exponent of this bias, ties to even; without sign, overflow or
// NaN. The quantum of x is a power of two, so scaling by its inverse is exact.
template <int MANTISSA, int BIAS>
DEVICE unsigned rounded(float x) {
  const int exponent = static_cast<int>(__float_as_uint(x) >> 23) - 127;
  const int kept = exponent < 1 - BIAS ? 1 - BIAS : exponent;
  const float scale = __uint_as_float(static_cast<unsigned>(127 + MANTISSA - kept) << 23);
  const unsigned quanta = static_cast<unsigned>(rintf(x * scale));
  return (static_cast<unsigned>(kept + BIAS) << MANTISSA) + quanta - (1u << MANTISSA);
}

DEVICE unsigned sign_of(float x) { return __float_as_uint(x) >> 31; }

DEVICE float wide(float x) { return x; }
DEVICE float wide(Bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
DEVICE float wide(F16 x) {
#ifdef __CUDA_ARCH__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#else
  const unsigned sign = (x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | mantissa << 13);
  if (exponent != 0) return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
  const float small = static_cast<float>(mantissa) * 5.9604644775390625e-08f;  // 2^-24
  return sign ? -small : small;
#endif
}

template <typename T>
struct Narrow;
template <>
struct Narrow<float> {
  static DEVICE float of(float x) { return x; }
};
template <>
struct Narrow<Bf16> {
  static DEVICE Bf16 of(float x) {
    Bf16 value;
#ifdef __CUDA_ARCH__
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(value.bits) : "f"(x));
#else
    const unsigned bits = __float_as_uint(x);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    value.bits = static_cast<std::uint16_t>(nan ? 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
#endif
    return value;
  }
};
template <>
struct Narrow<F16> {
  static DEVICE F16 of(float x) {
    F16 value;
#ifdef __CUDA_ARCH__
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(value.bits) : "f"(x));
#else
    const float size = fabsf(x);
    unsigned code = size >= 65520.0f ? 0x7c00u : rounded<10, 15>(size);
    if (x != x) code = 0x7e00u;
    value.bits = static_cast<std::uint16_t>(code | sign_of(x) << 15);
#endif
    return value;
  }
};
// What a format cannot hold becomes its largest value; sm_80 has no instruction for it.
template <typename T, int MANTISSA, int BIAS>
DEVICE T saturated(float x) {
  const float size = fminf(fabsf(x), T::kLargest);
  const unsigned code = x != x ? 0x7fu : rounded<MANTISSA, BIAS>(size);
  return T{static_cast<std::uint8_t>(code | sign_of(x) << 7)};
}
template <>
struct Narrow<E4m3> {
  static DEVICE E4m3 of(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    std::uint16_t pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(x));
    return E4m3{static_cast<std::uint8_t>(pair)};
#else
    return saturated<E4m3, 3, 7>(x);
#endif
  }
};
template <>
struct Narrow<E5m2> {
  static DEVICE E5m2 of(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    std::uint16_t pair;
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(x));
    return E5m2{static_cast<std::uint8_t>(pair)};
#else
    return saturated<E5m2, 2, 15>(x);
#endif
  }
};

// N numbers that are loaded and stored by one instruction.
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T x[N];
};

template <int N, typename T>
DEVICE Pack<T, N> load(const T* from) {
  CHECK_ALIGNED(from, alignof(Pack<T, N>));
  return *reinterpret_cast<const Pack<T, N>*>(from);
}

template <int N, typename T>
DEVICE void store(T* to, const Pack<T, N>& values) {
  CHECK_ALIGNED(to, alignof(Pack<T, N>));
  *reinterpret_cast<Pack<T, N>*>(to) = values;
}

// Over groups of `width` lanes, a power of two; every lane gets the result. All lanes of the warp take part.
DEVICE float warp_sum(float value, int width = kWarp) {
  for (int other = width / 2; other > 0; other /= 2) value += __shfl_xor_sync(kAll, value, other, kWarp);
  return value;
}
DEVICE float warp_max(float value, int width = kWarp) {
  for (int other = width / 2; other > 0; other /= 2) value = fmaxf(value, __shfl_xor_sync(kAll, value, other, kWarp));
  return value;
}

// Over a block of whole warps along x; `scratch` has a word for each of 32 warps. Every thread gets the result.
template <bool MAX>
DEVICE float block_all(float value, float* scratch) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  value = MAX ? warp_max(value) : warp_sum(value);
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  value = lane < warps ? scratch[lane] : (MAX ? -INFINITY : 0.0f);
  value = MAX ? warp_max(value) : warp_sum(value);
  __syncthreads();  // the next call writes there
  return value;
}
DEVICE float block_sum(float value, float* scratch) { return block_all<false>(value, scratch); }
DEVICE float block_max(float value, float* scratch) { return block_all<true>(value, scratch); }

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
constexpr I64 ceil_div(I64 a, I64 b) { return (a + b - 1) / b; }
