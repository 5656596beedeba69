// What stands between tensors and kernels: plain addresses and sizes. One struct an operation, whose fields are those
// of the operation's schema in bindings.cpp.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

using I64 = std::int64_t;

enum class Kind { f32, bf16, f16, e4m3, e5m2, u8, i64 };

// A tensor: its address, its elements' kind; null where an optional one is missing.
struct Array {
  void* data = nullptr;
  Kind kind = Kind::f32;
  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

struct NormForward {
  Array x, residual, weight, bias, y, sum, mean, scale;
  I64 rows, width;
  float eps;
};
void norm_forward(const NormForward& a, void* stream);

struct NormBackward {
  Array grad, grad_sum, x, weight, mean, scale, grad_x, grad_weight, grad_bias;  // of the last two `parts` rows
  I64 rows, width, parts;
};
void norm_backward(const NormBackward& a, void* stream);

struct Rope {
  Array x, cos, sin, weight, out;  // with a weight each head is normalised first
  I64 batch, tokens, heads, size, rotated, strides[3], table_stride;
  float eps, sign;
};
void rope(const Rope& a, void* stream);

struct NormRopeBackward {
  Array grad, x, cos, sin, weight, grad_x, grad_weight;  // the last one has `parts` rows
  I64 batch, tokens, heads, size, rotated, grad_strides[3], strides[3], table_stride, parts;
  float eps;
};
void norm_rope_backward(const NormRopeBackward& a, void* stream);

struct Swiglu {
  Array gate_up, grad, out;  // with `grad` the result is the gradient of gate_up
  I64 rows, width;
};
void swiglu(const Swiglu& a, void* stream);

struct Adamw {
  std::vector<Array> params, grads, averages, squares, copies;
  std::vector<I64> sizes;
  Array count, skip, clip;
  float lr, beta1, beta2, rest1, rest2, log_beta1, log_beta2, eps, decay;  // rest = 1 - beta, of the double
  bool decoupled;
};
void adamw(const Adamw& a, void* stream);

struct CrossEntropy {
  Array logits, labels, top, total, label, moment;
  I64 tokens, vocab, begin;
  float temperature, cap;
};
void cross_entropy_statistics(const CrossEntropy& a, void* stream);

struct CrossEntropyGradient {
  Array logits, labels, lse, of_log_prob, entropy, of_entropy, of_logit, out;
  I64 tokens, vocab, begin;
  float temperature, cap;
};
void cross_entropy_gradient(const CrossEntropyGradient& a, void* stream);

struct Gather {
  Array x, order, weights, out;
  I64 rows, width, copies;
};
void moe_gather(const Gather& a, void* stream);

struct GatherSum {
  Array x, slots, weights, out;
  I64 tokens, width, copies;
};
void moe_sum(const GatherSum& a, void* stream);

struct GatherDot {
  Array x, slots, grad, out;
  I64 tokens, width, copies;
};
void moe_dot(const GatherDot& a, void* stream);

struct Fp8 {
  Array x, scale, data, inverse, transposed;  // `scale` of the whole tensor, or null: made here
  I64 rows, columns;
  int block_rows, margin;  // block_rows 0: a scale for each row; 1 and 128: blocks of 128 columns and so many rows
  bool powers;
};
void fp8_amax(const Array& x, I64 count, const Array& out, void* stream);
void fp8_quantise(const Fp8& a, void* stream);

struct Nf4Dequantise {
  Array codes, scales, outer, mean, levels, table, out;
  I64 runs, length, begin, stride;
};
void nf4_dequantise(const Nf4Dequantise& a, void* stream);

struct PagedAttention {
  Array q, keys, values, table, lengths, sinks, parts, out;
  I64 rows, heads, kv_heads, size, positions, width, splits, window;
  float cap;
};
void paged_attention(const PagedAttention& a, void* stream);

template <typename T>
struct Tag {
  using Type = T;
};

struct Bf16;
struct F16;

// Calls `run` with the type of a floating kind.
template <typename Run>
void with_kind(Kind kind, Run run) {
  if (kind == Kind::f32) return run(Tag<float>{});
  if (kind == Kind::bf16) return run(Tag<Bf16>{});
  if (kind == Kind::f16) return run(Tag<F16>{});
  throw std::invalid_argument("float32, bfloat16 and float16 are taken");
}

inline bool aligned(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0; }
inline bool aligned(const Array& array) { return aligned(array.data); }
