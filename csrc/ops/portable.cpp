#include "kernels.hpp"

#define WIDTH 4
#define PANEL 6
#define VECTOR_REGISTER "x"
#define TABLE "portable"
#include "isa.hpp"

const megallm::Kernels* megallm::portable_kernels() { return &kKernels; }
