// What the kernels of every instruction set have in common: their arguments, and the table by which they are called.
// One translation unit per instruction set fills a table (vector.hpp); kernels.cpp chooses one when it is loaded.
#pragma once

#include <cstddef>
#include <cstdint>

namespace megallm {

using I64 = std::int64_t;

// A tensor [batch, tokens, heads, size] whose last dim is contiguous; strides count elements. `half`: bfloat16.
struct Strided {
  char* data;
  I64 batch, token, head;
  bool half;
};

// Queries [q_begin, q_end) against keys [k_begin, k_end): key j is seen from query i when low <= d < high for
// d = shift + (i - q_begin) - (j - k_begin).
struct Tile {
  I64 q_begin, q_end, k_begin, k_end, shift, low, high;
};

struct Attention {
  I64 batch, q_tokens, k_tokens, heads, kv_heads, size, value_size;
  float scale;
  const Tile* tiles;
  I64 num_tiles;
  Strided q, k, v, out, grad;             // forward: out is fp32 and is merged into
  float* lse;                             // [batch, q_tokens, heads]
  float *grad_q, *grad_k, *grad_v;        // contiguous fp32 sums
  I64 chunks;                             // backward: parts of the keys that have a grad_q of their own
  // packed fp32 copies, one row a token, padded to whole vectors; keys also transposed, block by block
  float *keys_t, *keys, *values, *values_t, *queries, *grads, *deltas, *sums_q;
};

struct Rows {  // of [rows, size]
  I64 rows, size;
  bool half;
};

struct Softmax {  // of logits [rows, size]
  const I64* labels;
  I64 begin;
  float temperature;
  bool half, half_out;
};

// Of A [rows, depth] and B [depth, columns] by strides, one of which is 1 for each; C [rows, columns] has rows of ldc.
struct Product {
  const float *a, *b;
  float* c;
  I64 rows, columns, depth, a_row, a_column, b_row, b_column, ldc;
  bool add;
};

// Every function works on items [begin, end) of what can be done side by side.
struct Kernels {
  const char* name;
  I64 width;       // floats of a vector
  I64 row_blocks;  // queries that an item of the forward pass has
  I64 key_block;
  void (*pack_keys)(const Attention&, bool, I64, I64);
  void (*pack_queries)(const Attention&, I64, I64);
  void (*attention_forward)(const Attention&, I64, I64);
  void (*attention_backward)(const Attention&, I64, I64);
  void (*rms_norm)(const Rows&, const void* x, const void* weight, bool half_weight, float eps, void* out, float* scale,
                   I64, I64);
  void (*rms_norm_backward)(const Rows&, const void* grad, const void* x, const void* weight, bool half_weight,
                            const float* scale, void* out, float* grad_weight, I64, I64);
  void (*swiglu)(const Rows&, const void* both, void* out, I64, I64);
  void (*swiglu_backward)(const Rows&, const void* grad, const void* both, void* out, I64, I64);
  void (*rope)(const Strided& x, const float* cos, const float* sin, void* out, I64 tokens, I64 heads, I64 size, I64 half,
               float sign, I64, I64);
  void (*softmax_statistics)(const Softmax&, I64 size, const void* logits, float* top, float* total, float* label,
                             float* moment, I64* best, I64, I64);
  void (*softmax_gradient)(const Softmax&, I64 size, const void* logits, const float* lse, const float* entropy,
                           const float* of_log_prob, const float* of_entropy, const float* at_label, void* out, I64, I64);
  void (*product)(const Product&, I64, I64, I64, I64);
};

const Kernels* avx512_kernels();  // null where the build has none
const Kernels* avx2_kernels();
const Kernels* portable_kernels();

}  // namespace megallm
