// C [M, N] (+)= A [M, K] B [K, N] of fp32 matrices, each by any strides of which one is 1, C by rows: blocks of A and B are
// packed into panels that stay in the caches (Goto and van de Geijn, 2008). No kernel is compiled or kept for a shape.

constexpr I64 DEPTH = 192, DOWN = 20 * PANEL, NARROW = 2 * WIDTH;
constexpr I64 RIGHT = 1 << 19;  // floats of B that are packed at once

// Rows [m0, m0 + rows) and depth [k0, k0 + depth) of A as panels [depth][PANEL].
static void pack_left(const Product& p, I64 m0, I64 rows, I64 k0, I64 depth, float* to) {
  for (I64 m = 0; m < rows; m += PANEL) {
    float* panel = to + m * depth;
    const I64 count = least(PANEL, rows - m);
    if (count < PANEL) __builtin_memset(panel, 0, sizeof(float) * PANEL * depth);
    if (p.a_column != 1) continue;
    const float* from = p.a + (m0 + m) * p.a_row + k0;
    I64 k = 0;
    for (; k + WIDTH <= depth && count == PANEL; k += WIDTH)
      for (I64 base = 0; base < PANEL; base += WIDTH) {
        Vec square[WIDTH];
        for (I64 i = 0; i < WIDTH; ++i) square[i] = base + i < PANEL ? load(from + (base + i) * p.a_row + k) : Vec{};
        transpose(square);
        for (I64 n = 0; n < WIDTH; ++n) store_some(panel + (k + n) * PANEL + base, square[n], PANEL - base);
      }
    for (; k < depth; ++k)
      for (I64 i = 0; i < count; ++i) panel[k * PANEL + i] = from[i * p.a_row + k];
  }
  if (p.a_column == 1) return;
  for (I64 k = 0; k < depth; ++k) {  // rows of A lie side by side
    const float* from = p.a + (k0 + k) * p.a_column + m0 * p.a_row;
    for (I64 m = 0; m < rows; m += PANEL)
      for (I64 i = 0; i < least(PANEL, rows - m); ++i) to[m * depth + k * PANEL + i] = from[(m + i) * p.a_row];
  }
}

// Depth [k0, k0 + depth) and columns [n0, n0 + columns) of B as panels [depth][NARROW], zeros behind the columns.
static void pack_right(const Product& p, I64 k0, I64 depth, I64 n0, I64 columns, float* to) {
  for (I64 n = 0; n < columns; n += NARROW) {
    float* panel = to + n * depth;
    const I64 count = least(NARROW, columns - n);
    if (p.b_column == 1) {
      const float* from = p.b + k0 * p.b_row + n0 + n;
      for (I64 k = 0; k < depth; ++k)
        for (I64 j = 0; j < NARROW; j += WIDTH)
          store(panel + k * NARROW + j, j < count ? load_some(from + k * p.b_row + j, count - j) : Vec{});
      continue;
    }
    const float* from = p.b + k0 * p.b_row + (n0 + n) * p.b_column;
    for (I64 j = 0; j < NARROW; j += WIDTH) {
      I64 k = 0;
      for (; k + WIDTH <= depth && p.b_row == 1; k += WIDTH) {
        Vec square[WIDTH];
        for (I64 i = 0; i < WIDTH; ++i) square[i] = j + i < count ? load(from + (j + i) * p.b_column + k) : Vec{};
        transpose(square);
        for (I64 i = 0; i < WIDTH; ++i) store(panel + (k + i) * NARROW + j, square[i]);
      }
      for (; k < depth; ++k)
        for (I64 i = 0; i < WIDTH; ++i)
          panel[k * NARROW + j + i] = j + i < count ? from[(j + i) * p.b_column + k * p.b_row] : 0.0f;
    }
  }
}

template <bool kAdd>
static __attribute__((noinline)) void packed_product(I64 rows, I64 columns, I64 depth, const float* left, const float* right,
                                                     float* c, I64 ldc) {
  for (I64 n = 0; n < columns; n += NARROW)
    for (I64 m = 0; m < rows; m += PANEL) {
      const float *a = left + m * depth, *b = right + n * depth;
      float* to = c + m * ldc + n;
      if (m + PANEL <= rows && n + NARROW <= columns) {
        multiply_panel<PANEL, 2, kAdd>(depth, a, 1, PANEL, b, NARROW, to, ldc);
        continue;
      }
      float tile[PANEL * NARROW];
      multiply_panel<PANEL, 2, false>(depth, a, 1, PANEL, b, NARROW, tile, NARROW);
      for (I64 i = 0; i < least(PANEL, rows - m); ++i)
        for (I64 j = 0; j < least(NARROW, columns - n); ++j)
          to[i * ldc + j] = tile[i * NARROW + j] + (kAdd ? to[i * ldc + j] : 0.0f);
    }
}

// Rows [m_begin, m_end) and columns [n_begin, n_end) of the result. A part is a depth of at most DEPTH; a block of C gets
// all parts of B that are packed before the next block is turned to.
static void product(const Product& p, I64 m_begin, I64 m_end, I64 n_begin, I64 n_end) {
  const I64 parts = most(1, up(p.depth, DEPTH) / DEPTH);
  const I64 across = least(up(least(most(RIGHT / most(p.depth, 1), 512), 4096), NARROW), up(n_end - n_begin, NARROW));
  const I64 group = least(most(RIGHT / (across * DEPTH), 1), parts), down = least(DOWN, up(m_end - m_begin, PANEL));
  float* left = scratch_of((across * group + down) * DEPTH + WIDTH);
  float* right = left + down * DEPTH;
  for (I64 n = n_begin; n < n_end; n += across) {
    const I64 columns = least(across, n_end - n);
    for (I64 first = 0; first < parts; first += group) {
      const I64 last = least(first + group, parts);
      const auto begin_of = [&](I64 part) { return p.depth * part / parts; };
      for (I64 part = first; part < last; ++part)
        pack_right(p, begin_of(part), begin_of(part + 1) - begin_of(part), n, columns, right + (part - first) * across * DEPTH);
      for (I64 m = m_begin; m < m_end; m += DOWN)
        for (I64 part = first; part < last; ++part) {
          const I64 rows = least(DOWN, m_end - m), k = begin_of(part), depth = begin_of(part + 1) - k;
          pack_left(p, m, rows, k, depth, left);
          float* to = p.c + m * p.ldc + n;
          const float* packed = right + (part - first) * across * DEPTH;
          if (part > 0 || p.add)
            packed_product<true>(rows, columns, depth, left, packed, to, p.ldc);
          else
            packed_product<false>(rows, columns, depth, left, packed, to, p.ldc);
        }
    }
  }
}
