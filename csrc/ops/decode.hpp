// What the files of decoding share: arithmetic on rows, inlined into functions for each kind of CPU.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define WIDE __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define INLINE inline __attribute__((always_inline))
#else
#define WIDE
#define INLINE inline
#endif

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

// Attention of one turned and scaled query [size] to positions `first` to `end` of a sequence whose `blocks` lie in pools
// [positions, size] -> result [size]; `weight` is room for end - first numbers.
template <typename T>
INLINE void attend_row(const T* turned, const T* keys, const T* values, const I64* blocks, I64 first, I64 end, I64 size,
                       T* weight, T* result) {
  T largest = -std::numeric_limits<T>::infinity();
  for (I64 begin = first; begin < end;) {
    const I64 stop = std::min(end, (begin / kBlock + 1) * kBlock);
    const T* key = keys + (blocks[begin / kBlock] * kBlock + begin % kBlock) * size;
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
  std::fill(result, result + size, T(0));
  for (I64 begin = first; begin < end;) {
    const I64 stop = std::min(end, (begin / kBlock + 1) * kBlock);
    const T* value = values + (blocks[begin / kBlock] * kBlock + begin % kBlock) * size;
    for (I64 i = begin; i < stop; ++i, value += size)
      for (I64 j = 0; j < size; ++j) result[j] += weight[i - first] * value[j];
    begin = stop;
  }
  for (I64 j = 0; j < size; ++j) result[j] /= total;
}

template <typename T>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace
