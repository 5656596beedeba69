// CUDA's words for a C++ compiler: a kernel runs on a CPU, every thread of a block a fiber, and each access to memory
// is seen (emulation.cpp). Kernels are compiled with -fsanitize=thread, whose calls the emulation answers itself.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __restrict__ __restrict

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emulation {

struct Builtins {
  dim3 thread, block, block_size, grid_size;
};
extern Builtins builtins;

// What is done with a buffer: a kernel only reads it, only writes it (or reads what it wrote), or both.
enum class Use { in, out, both };

// Buffers that kernels of this operation may touch, until `end`. `end` throws when a byte of an `out` was never written.
void begin(const char* operation);
void buffer(const void* data, std::int64_t bytes, Use use);
void end();
void abandon();

void run(const char* kernel, dim3 grid, dim3 block, std::int64_t shared_bytes, const void* closure, std::int64_t bytes,
         void (*body)(const void*));
void sync_block(const char* file, int line);
void sync_warp(unsigned mask, const char* file, int line);
std::uint64_t exchange(unsigned mask, std::uint64_t bits, int source, const char* file, int line);
void* shared(std::int64_t bytes, std::int64_t align, const char* file, int line);
void* dynamic_shared();
void check_aligned(const void* pointer, std::int64_t bytes, const char* file, int line);
unsigned atomic(void* address, unsigned value, unsigned (*change)(unsigned, unsigned));
int lane();

template <typename Body>
void launch(const char* kernel, dim3 grid, dim3 block, std::int64_t shared_bytes, const Body& body) {
  run(kernel, grid, block, shared_bytes, &body, sizeof body, [](const void* self) { (*static_cast<const Body*>(self))(); });
}

template <typename T>
T shuffle(unsigned mask, T value, int source, const char* file, int line) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = exchange(mask, bits, source, file, line);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The lane that CUDA's shuffles read, which stays in the group of `width` lanes; a lane outside reads itself.
inline int from_xor(int lane, int other, int width) { return (lane ^ other) / width == lane / width ? lane ^ other : lane; }
inline int from_down(int lane, int by, int width) { return lane % width + by < width ? lane + by : lane; }
inline int from_up(int lane, int by, int width) { return lane % width >= by ? lane - by : lane; }
inline int from_index(int lane, int index, int width) { return lane / width * width + index % width; }

}  // namespace emulation

#define threadIdx (emulation::builtins.thread)
#define blockIdx (emulation::builtins.block)
#define blockDim (emulation::builtins.block_size)
#define gridDim (emulation::builtins.grid_size)

#define __syncthreads() emulation::sync_block(__FILE__, __LINE__)
#define __syncwarp(MASK) emulation::sync_warp(MASK, __FILE__, __LINE__)
#define EMULATED_SHUFFLE(FROM, MASK, VALUE, OTHER, WIDTH) \
  emulation::shuffle(MASK, VALUE, emulation::FROM(emulation::lane(), OTHER, WIDTH), __FILE__, __LINE__)
#define __shfl_xor_sync(MASK, VALUE, OTHER, WIDTH) EMULATED_SHUFFLE(from_xor, MASK, VALUE, OTHER, WIDTH)
#define __shfl_down_sync(MASK, VALUE, BY, WIDTH) EMULATED_SHUFFLE(from_down, MASK, VALUE, BY, WIDTH)
#define __shfl_up_sync(MASK, VALUE, BY, WIDTH) EMULATED_SHUFFLE(from_up, MASK, VALUE, BY, WIDTH)
#define __shfl_sync(MASK, VALUE, INDEX, WIDTH) EMULATED_SHUFFLE(from_index, MASK, VALUE, INDEX, WIDTH)

#define SHARED(TYPE, NAME, COUNT) \
  TYPE* NAME = static_cast<TYPE*>(emulation::shared(sizeof(TYPE) * (COUNT), alignof(TYPE), __FILE__, __LINE__))
#define DYNAMIC_SHARED(TYPE, NAME) TYPE* NAME = static_cast<TYPE*>(emulation::dynamic_shared())
#define LAUNCH(KERNEL, GRID, BLOCK, SHARED_BYTES, STREAM, ...) \
  emulation::launch(#KERNEL, GRID, BLOCK, SHARED_BYTES, [=] { KERNEL(__VA_ARGS__); })
#define CHECK_ALIGNED(POINTER, BYTES) emulation::check_aligned(POINTER, BYTES, __FILE__, __LINE__)

inline unsigned atomicMax(unsigned* address, unsigned value) {
  return emulation::atomic(address, value, [](unsigned a, unsigned b) { return a > b ? a : b; });
}
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return emulation::atomic(address, value, [](unsigned a, unsigned b) { return a + b; });
}
inline float atomicAdd(float* address, float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  bits = emulation::atomic(address, bits, [](unsigned a, unsigned b) {
    float x, y;
    std::memcpy(&x, &a, 4);
    std::memcpy(&y, &b, 4);
    x += y;
    std::memcpy(&a, &x, 4);
    return a;
  });
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
