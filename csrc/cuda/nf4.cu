// NF4 to numbers, with the bits of megallm/ops/nf4.py: products and sums are not fused. Each thread makes eight values,
// which lie in one block of 64: a run of the matrix is whole blocks, but for the end of the matrix.
#include "launch.hpp"
#include "types.cuh"

namespace {

constexpr int kThreads = 256, kValues = 8, kBlock = 64, kOuterBlock = 256;

struct Runs {
  I64 count, length, begin, stride;  // in elements of the flattened matrix
};

template <typename T>
__global__ void __launch_bounds__(kThreads) dequantise(const std::uint8_t* codes, const std::uint8_t* scales, const float* outer, const float* mean,
                           const float* levels, const float* table, T* out, Runs runs, bool packed) {
  const I64 first = (static_cast<I64>(blockIdx.x) * kThreads + threadIdx.x) * kValues, total = runs.count * runs.length;
  if (first >= total) return;
  const I64 run = first / runs.length, within = first % runs.length;
  const I64 stored = run * ((runs.length + kBlock - 1) / kBlock) + within / kBlock;
  const I64 block = (runs.begin + run * runs.stride + within) / kBlock;
  const float scale = __fadd_rn(__fmul_rn(table[scales[stored]], outer[block / kOuterBlock]), *mean);
  if (packed && first + kValues <= total) {
    const Pack<std::uint8_t, kValues / 2> bytes = load<kValues / 2>(codes + first / 2);
    Pack<T, kValues> result;
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const int code = i % 2 ? bytes.x[i / 2] & 15 : bytes.x[i / 2] >> 4;
      result.x[i] = Narrow<T>::of(__fmul_rn(levels[code], scale));
    }
    return store(out + first, result);
  }
  for (int i = 0; i < kValues && first + i < total; ++i) {
    const std::uint8_t byte = codes[(first + i) / 2];
    out[first + i] = Narrow<T>::of(__fmul_rn(levels[i % 2 ? byte & 15 : byte >> 4], scale));
  }
}

}  // namespace

void nf4_dequantise(const Nf4Dequantise& a, void* stream) {
  const I64 total = a.runs * a.length;
  if (total == 0) return;
  with_kind(a.out.kind, [&](auto t) {
    using T = typename decltype(t)::Type;
    const auto kernel = dequantise<T>;
    const bool packed = aligned(a.codes) && aligned(a.out);
    LAUNCH(kernel, dim3(ceil_div(total, I64(kThreads * kValues))), dim3(kThreads), 0, stream, a.codes.as<std::uint8_t>(),
           a.scales.as<std::uint8_t>(), a.outer.as<float>(), a.mean.as<float>(), a.levels.as<float>(),
           a.table.as<float>(), a.out.as<T>(), Runs{a.runs, a.length, a.begin, a.stride}, packed);
  });
}
