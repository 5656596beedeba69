// What a kernel is written in: CUDA, or with MEGALLM_EMULATED the same words for a C++ compiler (emulation/cuda.hpp).
// SHARED, DYNAMIC_SHARED and LAUNCH stand for what only nvcc parses.
#pragma once

#include <cstdint>

#ifdef MEGALLM_EMULATED
#include "emulation/cuda.hpp"
#else
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#define SHARED(TYPE, NAME, COUNT) __shared__ TYPE NAME[COUNT]
#define DYNAMIC_SHARED(TYPE, NAME)                                \
  extern __shared__ __align__(16) unsigned char dynamic_shared[]; \
  TYPE* NAME = reinterpret_cast<TYPE*>(dynamic_shared)
// KERNEL is a name without template arguments, or a variable that holds an instantiation.
#define LAUNCH(KERNEL, GRID, BLOCK, SHARED_BYTES, STREAM, ...)                                              \
  do {                                                                                                      \
    KERNEL<<<GRID, BLOCK, SHARED_BYTES, static_cast<cudaStream_t>(STREAM)>>>(__VA_ARGS__);                  \
    const cudaError_t failed = cudaGetLastError();                                                          \
    if (failed != cudaSuccess) throw std::runtime_error(#KERNEL ": " + std::string(cudaGetErrorString(failed))); \
  } while (false)
#define CHECK_ALIGNED(POINTER, BYTES)
#endif

#define DEVICE __device__ __forceinline__

using I64 = std::int64_t;

constexpr unsigned kAll = 0xffffffffu;  // all lanes of a warp
constexpr int kWarp = 32;
