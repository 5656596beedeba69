#include "kernels.hpp"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

#define WIDTH 16
#define PANEL 12
#define VECTOR_REGISTER "v"
#define TABLE "avx512"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#include "isa.hpp"
#pragma GCC pop_options

const megallm::Kernels* megallm::avx512_kernels() { return &kKernels; }
#else
const megallm::Kernels* megallm::avx512_kernels() { return nullptr; }
#endif
