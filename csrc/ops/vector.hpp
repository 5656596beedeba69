// Vectors of WIDTH floats, for whatever instruction set the including file asks its compiler for. Everything is static and
// always inlined, so that no function of one instruction set can be taken for the same of another by the linker.

#define KERNEL static inline __attribute__((always_inline))

#if defined(__x86_64__)
#define ROUNDED_HERE(x) __asm__("" : "+" VECTOR_REGISTER(x))
#elif defined(__aarch64__)
#define ROUNDED_HERE(x) __asm__("" : "+w"(x))
#else
#define ROUNDED_HERE(x)
#endif

typedef float Vec __attribute__((vector_size(4 * WIDTH)));
typedef float VecAnywhere __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef std::int32_t IVec __attribute__((vector_size(4 * WIDTH)));
typedef std::uint32_t UVec __attribute__((vector_size(4 * WIDTH)));
typedef std::uint16_t HVec __attribute__((vector_size(2 * WIDTH)));
typedef std::uint16_t HVecAnywhere __attribute__((vector_size(2 * WIDTH), aligned(2), may_alias));
using Half = std::uint16_t;  // bfloat16

constexpr float kInfinity = __builtin_inff();

KERNEL Vec all(float x) { return Vec{} + x; }
KERNEL Vec pick(IVec where, Vec yes, Vec no) { return where ? yes : no; }
KERNEL Vec larger(Vec a, Vec b) { return a > b ? a : b; }

#if WIDTH == 16  // AVX-512
KERNEL Vec widened(HVec h) { return (Vec)((UVec)_mm512_cvtepu16_epi32((__m256i)h) << 16); }
KERNEL __mmask16 first_lanes(I64 count) { return static_cast<__mmask16>(count >= WIDTH ? 0xffff : (1u << count) - 1); }
#elif WIDTH == 8  // AVX2
KERNEL Vec widened(HVec h) { return (Vec)((UVec)_mm256_cvtepu16_epi32((__m128i)h) << 16); }
#else
KERNEL Vec widened(HVec h) { return (Vec)(__builtin_convertvector(h, UVec) << 16); }
#endif

KERNEL HVec narrowed(Vec x) {  // to nearest, ties to even; a NaN stays one
#if defined(BFLOAT16)
  return (HVec)_mm512_cvtneps_pbh((__m512)x);
#else
  const UVec bits = (UVec)x, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const UVec kept = (bits & 0x7fffffff) > 0x7f800000 ? (UVec{} + 0x7fc0) : rounded;
#if WIDTH == 16
  return (HVec)_mm512_cvtepi32_epi16((__m512i)kept);
#elif WIDTH == 8
  const __m256i pairs = _mm256_packus_epi32((__m256i)kept, (__m256i)kept);
  return (HVec)_mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x08));
#else
  return __builtin_convertvector(kept, HVec);
#endif
#endif
}

KERNEL Vec load(const float* p) { return *reinterpret_cast<const VecAnywhere*>(p); }
KERNEL Vec load(const Half* p) { return widened(*reinterpret_cast<const HVecAnywhere*>(p)); }
KERNEL void store(float* p, Vec x) { *reinterpret_cast<VecAnywhere*>(p) = x; }
KERNEL void store(Half* p, Vec x) { *reinterpret_cast<HVecAnywhere*>(p) = narrowed(x); }

#if WIDTH == 16
// The first `count`, which may be all; zeros behind them.
KERNEL Vec load_some(const float* p, I64 count) { return (Vec)_mm512_maskz_loadu_ps(first_lanes(count), p); }
KERNEL Vec load_some(const Half* p, I64 count) { return widened((HVec)_mm256_maskz_loadu_epi16(first_lanes(count), p)); }
KERNEL void store_some(float* p, Vec x, I64 count) { _mm512_mask_storeu_ps(p, first_lanes(count), (__m512)x); }
KERNEL void store_some(Half* p, Vec x, I64 count) {
  _mm256_mask_storeu_epi16(p, first_lanes(count), (__m256i)narrowed(x));
}
#else
template <typename T>
KERNEL Vec load_some(const T* p, I64 count) {
  if (count >= WIDTH) return load(p);
  T lanes[WIDTH] = {};
  for (I64 i = 0; i < count; ++i) lanes[i] = p[i];
  return load(lanes);
}
template <typename T>
KERNEL void store_some(T* p, Vec x, I64 count) {
  if (count >= WIDTH) return store(p, x);
  T lanes[WIDTH];
  store(lanes, x);
  for (I64 i = 0; i < count; ++i) p[i] = lanes[i];
}
#endif

KERNEL float one(const float* p) { return *p; }
KERNEL float one(const Half* p) {
  const std::uint32_t bits = static_cast<std::uint32_t>(*p) << 16;
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

#if WIDTH == 16
KERNEL float sum(Vec x) { return _mm512_reduce_add_ps((__m512)x); }
KERNEL float largest(Vec x) { return _mm512_reduce_max_ps((__m512)x); }
#else
KERNEL float sum(Vec x) {
  float lanes[WIDTH];
  store(lanes, x);
  for (I64 step = WIDTH / 2; step > 0; step /= 2)
    for (I64 i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  return lanes[0];
}
KERNEL float largest(Vec x) {
  float lanes[WIDTH];
  store(lanes, x);
  for (I64 i = 1; i < WIDTH; ++i) lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
  return lanes[0];
}
#endif

KERNEL IVec counting() {
  IVec lanes;
  for (int i = 0; i < WIDTH; ++i) lanes[i] = i;
  return lanes;
}

#if WIDTH == 16
// e^x to a rounding or two: 2^n p(r) with |r| <= log(2) / 2 (Cephes). A NaN stays one.
KERNEL Vec exponential(Vec x) {
  x = (Vec)_mm512_max_ps((__m512)all(-200.0f), (__m512)x);
  const Vec n = (Vec)_mm512_roundscale_ps((__m512)(x * 1.44269504088896341f), 8);
  Vec r = (Vec)_mm512_fnmadd_ps((__m512)n, (__m512)all(0.693359375f), (__m512)x);
  r = (Vec)_mm512_fnmadd_ps((__m512)n, (__m512)all(-2.12194440e-4f), (__m512)r);
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)n);
}
#else
// The same; 0 below -87.3.
KERNEL Vec exponential(Vec x) {
  const IVec tiny = x < all(-87.3f);
  x = x > all(88.0f) ? all(88.0f) : x;
  x = tiny ? all(-87.3f) : x;
  Vec n = x * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: what stays are integers
  ROUNDED_HERE(n);
  const IVec whole = (IVec)n - 0x4b400000;
  n = n - 12582912.0f;
  ROUNDED_HERE(n);
  Vec r = x - n * 0.693359375f;
  ROUNDED_HERE(r);
  r = r + n * 2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  p = p * (Vec)((whole + 127) << 23);
  return tiny ? Vec{} : p;
}
#endif

// WIDTH rows of WIDTH words, in place: in step `gap` the lanes that differ in that bit change places with rows that do.
template <int kGap>
KERNEL void exchange(Vec* rows) {
  IVec low, high;
  for (int i = 0; i < WIDTH; ++i) {
    low[i] = i & kGap ? WIDTH + i - kGap : i;
    high[i] = i & kGap ? WIDTH + i : i + kGap;
  }
#pragma GCC unroll 16
  for (int i = 0; i < WIDTH; ++i)
    if (!(i & kGap)) {
      const Vec a = rows[i], b = rows[i + kGap];
      rows[i] = __builtin_shuffle(a, b, low);
      rows[i + kGap] = __builtin_shuffle(a, b, high);
    }
}
KERNEL void transpose(Vec* rows) {
  exchange<1>(rows);
  exchange<2>(rows);
#if WIDTH >= 8
  exchange<4>(rows);
#endif
#if WIDTH >= 16
  exchange<8>(rows);
#endif
}

KERNEL I64 up(I64 x, I64 step) { return (x + step - 1) / step * step; }
KERNEL I64 least(I64 a, I64 b) { return a < b ? a : b; }
KERNEL I64 most(I64 a, I64 b) { return a > b ? a : b; }

// C [M, NV vectors] (+)= A [M, depth] B [depth, NV vectors], held in registers; A by any strides.
template <int M, int NV, bool kAdd>
KERNEL void multiply_panel(I64 depth, const float* a, I64 row, I64 column, const float* b, I64 ldb, float* c, I64 ldc) {
  Vec total[M][NV];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) total[i][j] = Vec{};
  for (I64 k = 0; k < depth; ++k, a += column, b += ldb) {
    Vec right[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) right[j] = load(b + j * WIDTH);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const Vec left = all(a[i * row]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) total[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {  // what is there is added last: it may be large beside one product
      float* to = c + i * ldc + j * WIDTH;
      store(to, kAdd ? load(to) + total[i][j] : total[i][j]);
    }
}

template <int M, bool kAdd>
static __attribute__((noinline)) void multiply_columns(I64 columns, I64 depth, const float* a, I64 row, I64 column, const float* b, I64 ldb, float* c,
                             I64 ldc) {
  I64 n = 0;
  for (; n + 2 * WIDTH <= columns; n += 2 * WIDTH)
    multiply_panel<M, 2, kAdd>(depth, a, row, column, b + n, ldb, c + n, ldc);
  if (n < columns) multiply_panel<M, 1, kAdd>(depth, a, row, column, b + n, ldb, c + n, ldc);
}

// `columns` are whole vectors.
template <bool kAdd>
static __attribute__((noinline)) void multiply(I64 rows, I64 columns, I64 depth, const float* a, I64 row, I64 column, const float* b, I64 ldb, float* c,
                     I64 ldc) {
  if (columns <= 0) return;
  I64 m = 0;
  for (; m + PANEL <= rows; m += PANEL)
    multiply_columns<PANEL, kAdd>(columns, depth, a + m * row, row, column, b, ldb, c + m * ldc, ldc);
  for (; m + PANEL / 2 <= rows; m += PANEL / 2)
    multiply_columns<PANEL / 2, kAdd>(columns, depth, a + m * row, row, column, b, ldb, c + m * ldc, ldc);
  for (; m + 2 <= rows; m += 2)
    multiply_columns<2, kAdd>(columns, depth, a + m * row, row, column, b, ldb, c + m * ldc, ldc);
  for (; m < rows; ++m) multiply_columns<1, kAdd>(columns, depth, a + m * row, row, column, b, ldb, c + m * ldc, ldc);
}
