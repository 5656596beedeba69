// FP8 by scales of a tensor, a row, or blocks of 128 columns and one or 128 rows, and transposed in the same pass.
// A value is stored as fp8(x * scale) and read as data * inverse. The largest magnitude is taken of the bits, as
// unsigned numbers: those of a NaN are larger than all others, so it is not lost as with fmax.
#include "launch.hpp"
#include "types.cuh"

namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp, kTile = 128, kPack = 4, kRows = kTile / kWarps;
constexpr int kPitch = kTile + 4;  // bytes between the rows of a tile in shared memory: columns lie in different banks

DEVICE unsigned size_of(float x) { return __float_as_uint(x) & 0x7fffffffu; }

DEVICE unsigned warp_largest(unsigned value) {
  for (int other = kWarp / 2; other > 0; other /= 2) {
    const unsigned theirs = __shfl_xor_sync(kAll, value, other, kWarp);
    value = theirs > value ? theirs : value;
  }
  return value;
}

DEVICE unsigned block_largest(unsigned value, unsigned* scratch) {
  const int lane = threadIdx.x % kWarp;
  value = warp_largest(value);
  if (lane == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = warp_largest(lane < kWarps ? scratch[lane] : 0u);
  __syncthreads();  // the next call writes there
  return value;
}

struct Scaling {
  float largest;
  int margin;
  bool powers;

  // largest / amax / 2^margin, or the power of two next below; 1 where amax is zero or not finite.
  DEVICE float of(unsigned amax) const {
    if (amax == 0 || amax >= 0x7f800000u) return 1.0f;
    const float power = __uint_as_float(static_cast<unsigned>(127 - margin) << 23);
    // torch divides a number by a tensor as the number times the inverse, rounded twice.
    float scale = fminf(__fmul_rn(__fmul_rn(1.0f / __uint_as_float(amax), largest), power), 3.402823466e38f);
    if (powers) scale = __uint_as_float(__float_as_uint(scale) & 0xff800000u);
    return scale;
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads) largest(const T* x, I64 count, unsigned* out) {
  SHARED(unsigned, scratch, kWarps);
  constexpr int V = 16 / sizeof(T);
  unsigned value = 0;
  const I64 thread = static_cast<I64>(blockIdx.x) * kThreads + threadIdx.x, threads = static_cast<I64>(gridDim.x) * kThreads;
  const I64 packs = reinterpret_cast<std::uintptr_t>(x) % 16 == 0 ? count / V : 0;
  for (I64 i = thread; i < packs; i += threads) {
    const Pack<T, V> values = load<V>(x + i * V);
#pragma unroll
    for (int j = 0; j < V; ++j) value = size_of(wide(values.x[j])) > value ? size_of(wide(values.x[j])) : value;
  }
  for (I64 i = packs * V + thread; i < count; i += threads) value = size_of(wide(x[i])) > value ? size_of(wide(x[i])) : value;
  value = block_largest(value, scratch);
  if (threadIdx.x == 0) atomicMax(out, value);
}

// Four numbers of a row from `column` on; zeros behind its end.
template <typename T>
DEVICE Pack<T, kPack> four(const T* row, I64 column, I64 columns, bool packed) {
  Pack<T, kPack> values;
  if (packed && column < columns) return load<kPack>(row + column);
#pragma unroll
  for (int i = 0; i < kPack; ++i) values.x[i] = column + i < columns ? row[column + i] : Narrow<T>::of(0.0f);
  return values;
}

template <typename F>
DEVICE void put_four(F* row, I64 column, I64 columns, bool packed, const Pack<F, kPack>& values) {
  if (packed && column < columns) return store(row + column, values);
#pragma unroll
  for (int i = 0; i < kPack; ++i)
    if (column + i < columns) row[column + i] = values.x[i];
}

template <typename T>
DEVICE unsigned largest_of(const Pack<T, kPack>& values) {
  unsigned value = 0;
#pragma unroll
  for (int i = 0; i < kPack; ++i) value = size_of(wide(values.x[i])) > value ? size_of(wide(values.x[i])) : value;
  return value;
}

template <typename F, typename T>
DEVICE Pack<F, kPack> stored(const Pack<T, kPack>& values, float scale) {
  Pack<F, kPack> result;
#pragma unroll
  for (int i = 0; i < kPack; ++i) result.x[i] = Narrow<F>::of(wide(values.x[i]) * scale);
  return result;
}

// A block a row.
template <typename T, typename F>
__global__ void __launch_bounds__(kThreads) quantise_rows(const T* x, F* data, float* inverse, I64 columns, Scaling scaling, bool packed) {
  SHARED(unsigned, scratch, kWarps);
  const T* row = x + blockIdx.x * columns;
  unsigned value = 0;
  for (I64 i = threadIdx.x * kPack; i < columns; i += kThreads * kPack) {
    const unsigned one = largest_of(four(row, i, columns, packed));
    value = one > value ? one : value;
  }
  const float scale = scaling.of(block_largest(value, scratch));
  if (threadIdx.x == 0) inverse[blockIdx.x] = 1.0f / scale;
  for (I64 i = threadIdx.x * kPack; i < columns; i += kThreads * kPack)
    put_four(data + blockIdx.x * columns, i, columns, packed, stored<F>(four(row, i, columns, packed), scale));
}

struct Tiled {
  I64 rows, columns;
  int block_rows;  // 0: one scale, which is given
  bool packed, packed_columns;
};

// A block a tile of 128 x 128, a warp every eighth row of it, a lane four columns.
template <typename T, typename F>
__global__ void __launch_bounds__(kThreads) quantise_tiles(const T* x, const float* given, F* data, float* inverse, F* transposed, Tiled at, Scaling scaling) {
  SHARED(unsigned, scratch, kWarps);
  SHARED(std::uint8_t, tile, kTile * kPitch);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const I64 first = static_cast<I64>(blockIdx.y) * kTile, left = static_cast<I64>(blockIdx.x) * kTile;
  const I64 column = left + lane * kPack, blocks = gridDim.x;
  Pack<T, kPack> kept[kRows];
  unsigned value = 0;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const I64 row = first + warp + i * kWarps;
    kept[i] = four(x + row * at.columns, column, row < at.rows ? at.columns : 0, at.packed);
    const unsigned one = largest_of(kept[i]);
    value = one > value ? one : value;
  }
  float scale = at.block_rows == 0 ? *given : 1.0f;
  if (at.block_rows == kTile) {
    scale = scaling.of(block_largest(value, scratch));
    if (threadIdx.x == 0) inverse[blockIdx.y * blocks + blockIdx.x] = 1.0f / scale;
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const I64 row = first + warp + i * kWarps;
    if (at.block_rows == 1) {
      scale = scaling.of(warp_largest(largest_of(kept[i])));
      if (lane == 0 && row < at.rows) inverse[row * blocks + blockIdx.x] = 1.0f / scale;
    }
    const Pack<F, kPack> result = stored<F>(kept[i], scale);
    put_four(data + row * at.columns, column, row < at.rows ? at.columns : 0, at.packed, result);
    if (transposed) {
#pragma unroll
      for (int j = 0; j < kPack; ++j) tile[(warp + i * kWarps) * kPitch + lane * kPack + j] = result.x[j].bits;
    }
  }
  if (!transposed) return;
  __syncthreads();
  for (int i = warp; i < kTile && left + i < at.columns; i += kWarps) {
    Pack<F, kPack> result;
#pragma unroll
    for (int j = 0; j < kPack; ++j) result.x[j].bits = tile[(lane * kPack + j) * kPitch + i];
    put_four(transposed + (left + i) * at.rows, first + lane * kPack, at.rows, at.packed_columns, result);
  }
}

template <typename Run>
void with_format(Kind kind, Run run) {
  if (kind == Kind::e4m3) return run(Tag<E4m3>{});
  if (kind == Kind::e5m2) return run(Tag<E5m2>{});
  throw std::invalid_argument("fp8_quantise: the result is float8_e4m3fn or float8_e5m2");
}

}  // namespace

void fp8_amax(const Array& x, I64 count, const Array& out, void* stream) {
  if (count == 0) return;
  const I64 blocks = ceil_div(count, I64(kThreads * 16));
  with_kind(x.kind, [&](auto t) {
    using T = typename decltype(t)::Type;
    const auto kernel = largest<T>;
    LAUNCH(kernel, dim3(blocks < 1056 ? blocks : 1056), dim3(kThreads), 0, stream, x.as<T>(), count, out.as<unsigned>());
  });
}

void fp8_quantise(const Fp8& a, void* stream) {
  if (a.rows == 0 || a.columns == 0) return;
  with_kind(a.x.kind, [&](auto t) {
    with_format(a.data.kind, [&](auto f) {
      using T = typename decltype(t)::Type;
      using F = typename decltype(f)::Type;
      const bool packed = a.columns % kPack == 0 && aligned(a.x) && aligned(a.data);
      const Scaling scaling{F::kLargest, a.margin, a.powers};
      if (a.scale.data == nullptr && a.block_rows == 0) {
        const auto kernel = quantise_rows<T, F>;
        LAUNCH(kernel, dim3(a.rows), dim3(kThreads), 0, stream, a.x.as<T>(), a.data.as<F>(), a.inverse.as<float>(),
               a.columns, scaling, packed);
        return;
      }
      const Tiled tiled{a.rows, a.columns, a.scale.data ? 0 : a.block_rows, packed, a.rows % kPack == 0 && aligned(a.transposed)};
      const auto kernel = quantise_tiles<T, F>;
      const dim3 grid(ceil_div(a.columns, I64(kTile)), ceil_div(a.rows, I64(kTile)));
      LAUNCH(kernel, grid, dim3(kThreads), 0, stream, a.x.as<T>(), a.scale.as<float>(), a.data.as<F>(),
             a.inverse.as<float>(), a.transposed.as<F>(), tiled, scaling);
    });
  });
}
