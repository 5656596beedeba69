#include "kernels.hpp"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

#define WIDTH 8
#define PANEL 6
#define VECTOR_REGISTER "x"
#define TABLE "avx2"
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2")
#include "isa.hpp"
#pragma GCC pop_options

const megallm::Kernels* megallm::avx2_kernels() { return &kKernels; }
#else
const megallm::Kernels* megallm::avx2_kernels() { return nullptr; }
#endif
