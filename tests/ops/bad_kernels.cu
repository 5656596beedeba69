// Kernels with one mistake each, which the emulation must find; "right" has none.
#include <cstring>
#include <string>

#include "types.cuh"

namespace {

constexpr int kThreads = 64;
using emulation::Use;

__global__ void right(const float* x, float* y, int count) {
  SHARED(float, kept, kThreads);
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  kept[threadIdx.x] = i < count ? x[i] : 0.0f;
  __syncthreads();
  const float other = kept[blockDim.x - 1 - threadIdx.x];
  const float total = warp_sum(other);
  if (i < count) y[i] = total;
}

__global__ void without_barrier(const float* x, float* y, int count) {
  SHARED(float, kept, kThreads);
  kept[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = kept[threadIdx.x / 2];
}

// Lanes of one warp are not in step either, since Volta.
__global__ void without_warp_barrier(const float* x, float* y, int count) {
  SHARED(float, kept, kThreads);
  kept[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = kept[threadIdx.x / 32 * 32];
}

__global__ void with_warp_barrier(const float* x, float* y, int count) {
  SHARED(float, kept, kThreads);
  kept[threadIdx.x] = x[threadIdx.x];
  __syncwarp(kAll);
  y[threadIdx.x] = kept[threadIdx.x ^ 1];
}

// The second write would reach a word that another thread may still read.
__global__ void without_second_barrier(const float* x, float* y, int count) {
  SHARED(float, kept, kThreads);
  float total = 0;
  for (int round = 0; round < 2; ++round) {
    kept[threadIdx.x] = x[threadIdx.x] + round;
    __syncthreads();
    total += kept[threadIdx.x / 2];
  }
  y[threadIdx.x] = total;
}

__global__ void blocks_share_a_word(const float* x, float* y, int count) {
  y[threadIdx.x] = x[threadIdx.x] + blockIdx.x;
}

__global__ void past_the_end(const float* x, float* y, int count) {
  y[threadIdx.x] = x[threadIdx.x + (threadIdx.x == 63)];
}

__global__ void far_away(const float* x, float* y, int count) { y[threadIdx.x] = x[-4096]; }

__global__ void past_shared(const float* x, float* y, int count) {
  SHARED(float, kept, 64);
  kept[threadIdx.x + 1] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = kept[1];
}

__global__ void writes_input(const float* x, float* y, int count) {
  const_cast<float*>(x)[threadIdx.x] = 0;
  y[threadIdx.x] = 0;
}

__global__ void forgets_one(const float* x, float* y, int count) {
  if (threadIdx.x != 5) y[threadIdx.x] = x[threadIdx.x];
}

__global__ void reads_unwritten(const float* x, float* y, int count) { y[threadIdx.x] = y[threadIdx.x] + x[threadIdx.x]; }

__global__ void reads_unwritten_shared(const float* x, float* y, int count) {
  SHARED(float, kept, kThreads);
  y[threadIdx.x] = x[threadIdx.x] + kept[threadIdx.x];
}

__global__ void two_barriers(const float* x, float* y, int count) {
  y[threadIdx.x] = x[threadIdx.x];
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void shuffles_without_all(const float* x, float* y, int count) {
  y[threadIdx.x] = x[threadIdx.x];
  if (threadIdx.x % 2 == 0) return;
  y[threadIdx.x] = warp_sum(x[threadIdx.x]);
}

__global__ void waits_for_ever(const float* x, float* y, int count) {
  y[threadIdx.x] = x[threadIdx.x];
  if (threadIdx.x < 8) __syncwarp(kAll);
  __syncthreads();
}

// The bits of a sum of floats depend on the order of its terms.
__global__ void order_of_atomics(const float* x, float* y, int count) {
  if (threadIdx.x == 0) y[threadIdx.x] = 0;
  __syncthreads();
  for (int i = threadIdx.x + 1; i < kThreads; i += blockDim.x) y[i] = 0;
  __syncthreads();
  atomicAdd(y, x[threadIdx.x]);
}

__global__ void atomic_and_plain(const float* x, float* y, int count) {
  y[threadIdx.x] = x[threadIdx.x];
  atomicAdd(y + (threadIdx.x ^ 1), 1.0f);
}

__global__ void not_aligned(const float* x, float* y, int count) {
  store(y + 4 * threadIdx.x % 64, load<4>(x + 1 + 4 * (threadIdx.x % 15)));
}

}  // namespace

#define CASE(NAME, BLOCKS) \
  if (which == #NAME) LAUNCH(NAME, dim3(BLOCKS), dim3(kThreads), 0, nullptr, x, y, kThreads)

// Returns what was found, or an empty text.
extern "C" const char* run_case(const char* name) {
  static std::string found;
  alignas(16) static float x[kThreads], y[kThreads];
  for (int i = 0; i < kThreads; ++i) x[i] = 1.0f / (i + 3) + (i % 3 ? 1e4f : 0.0f), y[i] = 0;
  const std::string which(name);
  found.clear();
  try {
    emulation::begin(name);
    emulation::buffer(x, sizeof x, Use::in);
    emulation::buffer(y, sizeof y, Use::out);
    CASE(right, 1);
    CASE(without_barrier, 1);
    CASE(without_warp_barrier, 1);
    CASE(with_warp_barrier, 1);
    CASE(without_second_barrier, 1);
    CASE(blocks_share_a_word, 2);
    CASE(past_the_end, 1);
    CASE(far_away, 1);
    CASE(past_shared, 1);
    CASE(writes_input, 1);
    CASE(forgets_one, 1);
    CASE(reads_unwritten, 1);
    CASE(reads_unwritten_shared, 1);
    CASE(two_barriers, 1);
    CASE(shuffles_without_all, 1);
    CASE(waits_for_ever, 1);
    CASE(order_of_atomics, 1);
    CASE(atomic_and_plain, 1);
    CASE(not_aligned, 1);
    emulation::end();
  } catch (const std::exception& error) {
    emulation::abandon();
    found = error.what();
  }
  return found.c_str();
}
