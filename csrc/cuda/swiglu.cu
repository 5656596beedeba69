// silu(gate) * up of rows [gate, up], and its gradient: each thread a pack of one row.
#include "launch.hpp"
#include "types.cuh"

namespace {

constexpr int kThreads = 256;

template <typename T, int V, bool GRADIENT>
__global__ void __launch_bounds__(kThreads) swiglu_rows(const T* gate_up, const T* grad, T* out, I64 packs, int packs_of_row) {
  const I64 pack = static_cast<I64>(blockIdx.x) * kThreads + threadIdx.x;
  if (pack >= packs) return;
  const I64 row = pack / packs_of_row, column = (pack % packs_of_row) * V, width = static_cast<I64>(packs_of_row) * V;
  const I64 at = row * 2 * width + column;
  Pack<T, V> gate = load<V>(gate_up + at), up = load<V>(gate_up + at + width);
  Pack<T, V> upstream = GRADIENT ? load<V>(grad + row * width + column) : gate;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const float x = wide(gate.x[i]), y = wide(up.x[i]), share = 1.0f / (1.0f + expf(-x));
    if (!GRADIENT) {
      gate.x[i] = Narrow<T>::of(x * share * y);
    } else {
      const float dy = wide(upstream.x[i]);
      gate.x[i] = Narrow<T>::of(dy * y * share * (1.0f + x * (1.0f - share)));
      up.x[i] = Narrow<T>::of(dy * x * share);
    }
  }
  store(out + (GRADIENT ? at : row * width + column), gate);
  if (GRADIENT) store(out + at + width, up);
}

}  // namespace

void swiglu(const Swiglu& a, void* stream) {
  if (a.rows == 0 || a.width == 0) return;
  with_kind(a.gate_up.kind, [&](auto t) {
    using T = typename decltype(t)::Type;
    constexpr int V = 16 / sizeof(T);
    const auto run = [&](auto kernel, int pack) {
      const I64 packs = a.rows * a.width / pack;
      LAUNCH(kernel, dim3(ceil_div(packs, I64(kThreads))), dim3(kThreads), 0, stream, a.gate_up.as<T>(), a.grad.as<T>(),
             a.out.as<T>(), packs, static_cast<int>(a.width / pack));
    };
    if (aligned(a.gate_up) && aligned(a.grad) && aligned(a.out) && a.width % V == 0)
      run(a.grad.data ? swiglu_rows<T, V, true> : swiglu_rows<T, V, false>, V);
    else
      run(a.grad.data ? swiglu_rows<T, 1, true> : swiglu_rows<T, 1, false>, 1);
  });
}
