// The operations as torch knows them: schemas, checks of what comes in, addresses for the kernels. Through torch's
// stable ABI: one build serves torch 2.10 and later. MEGALLM_EMULATED registers the same operations for a CPU, as
// megallm_emulated, and shows the emulation which memory each of them may touch.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "launch.hpp"

#ifdef MEGALLM_EMULATED
#include "emulation/cuda.hpp"
#define OPERATIONS megallm_emulated
#define DEVICE_KEY CPU
#else
#include <torch/csrc/stable/accelerator.h>
#define OPERATIONS megallm_cuda
#define DEVICE_KEY CUDA
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;
using Many = std::vector<Tensor>;

Kind kind_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Kind::f32;
    case ScalarType::BFloat16: return Kind::bf16;
    case ScalarType::Half: return Kind::f16;
    case ScalarType::Float8_e4m3fn: return Kind::e4m3;
    case ScalarType::Float8_e5m2: return Kind::e5m2;
    case ScalarType::Byte: return Kind::u8;
    case ScalarType::Long: return Kind::i64;
    default: STD_TORCH_CHECK(false, "a tensor of a dtype that no kernel takes");
  }
  return Kind::f32;
}

// One call of an operation: on the device of its first tensor, in torch's stream.
class Call {
 public:
#ifdef MEGALLM_EMULATED
  Call(const char* name, const Tensor&) : name_(name) { emulation::begin(name); }
  ~Call() { emulation::abandon(); }
  void* stream() const { return nullptr; }
  void end() { emulation::end(); }
  using Use = emulation::Use;
  void show(const Tensor& x, Use use) {
    I64 last = 0;  // a view with gaps is shown whole
    for (I64 i = 0; i < x.dim(); ++i) last += (x.size(i) - 1) * x.stride(i);
    emulation::buffer(x.data_ptr(), x.numel() ? (last + 1) * I64(x.element_size()) : 0, use);
  }
#else
  Call(const char* name, const Tensor& first) : name_(name), device_(first.get_device_index()), guard_(device_) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream_));
  }
  void* stream() const { return stream_; }
  void end() {}
  enum class Use { in, out, both };
  void show(const Tensor& x, Use) {
    STD_TORCH_CHECK(x.get_device_index() == device_, name_, ": its tensors are on several devices");
  }
#endif

  Array in(const Tensor& x) { return whole(x, Use::in); }
  Array out(const Tensor& x) { return whole(x, Use::out); }
  Array both(const Tensor& x) { return whole(x, Use::both); }
  Array in(const Maybe& x) { return x ? in(*x) : Array{}; }
  Array out(const Maybe& x) { return x ? out(*x) : Array{}; }
  // Of any strides, but elements of the last dim lie together.
  Array rows(const Tensor& x) {
    STD_TORCH_CHECK(x.dim() == 0 || x.size(x.dim() - 1) < 2 || x.stride(x.dim() - 1) == 1, name_, ": rows are not contiguous");
    show(x, Use::in);
    return {x.data_ptr(), kind_of(x)};
  }

  void check(bool holds, const char* what) const { STD_TORCH_CHECK(holds, name_, ": ", what); }

 private:
  Array whole(const Tensor& x, Use use) {
    STD_TORCH_CHECK(x.is_contiguous(), name_, ": a tensor is not contiguous");
    show(x, use);
    return {x.data_ptr(), kind_of(x)};
  }

  const char* name_;
#ifndef MEGALLM_EMULATED
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
#endif
};

I64 last(const Tensor& x) { return x.size(x.dim() - 1); }
I64 rows_of(const Tensor& x) { return last(x) ? x.numel() / last(x) : 0; }
bool has(const Maybe& x, I64 count) { return !x || x->numel() == count; }
bool like(const Tensor& x, const Tensor& y) { return kind_of(x) == kind_of(y); }
bool like(const Maybe& x, const Tensor& y) { return !x || like(*x, y); }
bool is(const Tensor& x, Kind kind) { return kind_of(x) == kind; }
bool is(const Maybe& x, Kind kind) { return !x || is(*x, kind); }

// y = norm(x + residual) weight + bias; sum = x + residual in their dtype. With `mean` LayerNorm, without RMSNorm.
void norm(const Tensor& x, const Maybe& residual, const Tensor& weight, const Maybe& bias, double eps, const Tensor& y,
          const Maybe& sum, const Maybe& mean, const Tensor& scale) {
  Call call("norm", x);
  const I64 rows = rows_of(x), width = last(x);
  call.check(weight.numel() == width && has(bias, width), "weight and bias have an element for each of a row");
  call.check(y.numel() == x.numel() && has(residual, x.numel()) && has(sum, x.numel()), "x, residual, y and sum have one shape");
  call.check(residual.has_value() == sum.has_value(), "a sum comes of a residual");
  call.check(has(mean, rows) && scale.numel() == rows, "mean and scale have an element for each row");
  call.check(width < (1 << 30), "rows are shorter than 2^30");
  call.check(like(residual, x) && like(sum, x) && like(y, x) && like(bias, weight), "a dtype differs");
  call.check(is(mean, Kind::f32) && is(scale, Kind::f32), "mean and scale are float32");
  norm_forward({call.in(x), call.in(residual), call.in(weight), call.in(bias), call.out(y), call.out(sum), call.out(mean),
                call.out(scale), rows, width, static_cast<float>(eps)}, call.stream());
  call.end();
}

// grad_weight and grad_bias [parts, D] are sums over some rows each; grad_sum is that of `sum`.
void norm_grad(const Tensor& grad, const Maybe& grad_sum, const Tensor& x, const Tensor& weight, const Maybe& mean,
               const Tensor& scale, const Tensor& grad_x, const Tensor& grad_weight, const Maybe& grad_bias) {
  Call call("norm_backward", x);
  const I64 rows = rows_of(x), width = last(x), parts = grad_weight.size(0);
  call.check(grad.numel() == x.numel() && grad_x.numel() == x.numel() && has(grad_sum, x.numel()), "gradients have the shape of x");
  call.check(like(grad, x) && like(grad_x, x) && like(grad_sum, x), "gradients have the dtype of x");
  call.check(is(mean, Kind::f32) && is(scale, Kind::f32) && is(grad_weight, Kind::f32) && is(grad_bias, Kind::f32),
             "what is summed is float32");
  call.check(weight.numel() == width && has(mean, rows) && scale.numel() == rows, "weight, mean or scale has another size");
  call.check(parts <= rows && grad_weight.numel() == parts * width && has(grad_bias, parts * width), "parts of at most all rows");
  call.check(mean.has_value() == grad_bias.has_value(), "a mean comes with a bias");
  norm_backward({call.in(grad), call.in(grad_sum), call.in(x), call.in(weight), call.in(mean), call.in(scale),
                 call.out(grad_x), call.out(grad_weight), call.out(grad_bias), rows, width, parts}, call.stream());
  call.end();
}

// Rotates heads x [B, T, H, E] by cos and sin [B or 1, T, R/2]; with a weight [E] each is normalised first. `sign` -1
// turns back.
void rotate(const Tensor& x, const Tensor& cos, const Tensor& sin, const Maybe& weight, double eps, double sign, const Tensor& out) {
  Call call("rope", x);
  call.check(x.dim() == 4 && cos.dim() == 3 && out.numel() == x.numel() && sin.numel() == cos.numel(), "shapes do not fit");
  const I64 rotated = 2 * last(cos);
  call.check(rotated <= last(x) && cos.size(1) == x.size(1) && (cos.size(0) == 1 || cos.size(0) == x.size(0)), "tables do not fit");
  call.check(is(cos, Kind::f32) && is(sin, Kind::f32) && is(weight, Kind::f32) && like(out, x), "tables and weight are float32");
  call.check(has(weight, last(x)), "the weight has an element for each of a head");
  rope({call.rows(x), call.in(cos), call.in(sin), call.in(weight), call.out(out), x.size(0), x.size(1), x.size(2), last(x),
        rotated, {x.stride(0), x.stride(1), x.stride(2)}, cos.size(0) == 1 ? 0 : cos.stride(0), static_cast<float>(eps),
        static_cast<float>(sign)}, call.stream());
  call.end();
}

// grad_weight [parts, E]: sums over some heads each.
void rotate_grad(const Tensor& grad, const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& weight, double eps,
                 const Tensor& grad_x, const Tensor& grad_weight) {
  Call call("norm_rope_backward", x);
  const I64 parts = grad_weight.size(0);
  call.check(x.dim() == 4 && grad.dim() == 4 && cos.dim() == 3 && grad.numel() == x.numel() && grad_x.numel() == x.numel(), "shapes do not fit");
  call.check(cos.size(1) == x.size(1) && (cos.size(0) == 1 || cos.size(0) == x.size(0)) && sin.numel() == cos.numel(), "tables do not fit");
  call.check(is(cos, Kind::f32) && is(sin, Kind::f32) && is(weight, Kind::f32) && is(grad_weight, Kind::f32), "tables and weights are float32");
  call.check(like(grad, x) && like(grad_x, x) && weight.numel() == last(x) && last(grad_weight) == last(x), "a dtype or the weight differs");
  call.check(parts <= x.numel() / (last(x) ? last(x) : 1), "parts of at most all heads");
  norm_rope_backward({call.rows(grad), call.rows(x), call.in(cos), call.in(sin), call.in(weight), call.out(grad_x),
                      call.out(grad_weight), x.size(0), x.size(1), x.size(2), last(x), 2 * last(cos),
                      {grad.stride(0), grad.stride(1), grad.stride(2)}, {x.stride(0), x.stride(1), x.stride(2)},
                      cos.size(0) == 1 ? 0 : cos.stride(0), parts, static_cast<float>(eps)}, call.stream());
  call.end();
}

// gate_up [..., 2 F] -> out [..., F], or with `grad` [..., F] -> its gradient.
void swiglu_both(const Tensor& gate_up, const Maybe& grad, const Tensor& out) {
  Call call("swiglu", gate_up);
  const I64 rows = rows_of(gate_up), width = last(gate_up) / 2;
  call.check(last(gate_up) % 2 == 0 && has(grad, rows * width), "rows are a gate and an up of one length");
  call.check(out.numel() == (grad ? 2 : 1) * rows * width && like(out, gate_up) && like(grad, gate_up), "the result does not fit");
  swiglu({call.in(gate_up), call.in(grad), call.out(out), rows, width}, call.stream());
  call.end();
}

// Lists of one length; `copies` may be empty. count, skip and clip are float32 scalars on the device.
void adamw_lists(const Many& params, const Many& grads, const Many& averages, const Many& squares, const Many& copies,
                 const Tensor& count, const Tensor& skip, const Maybe& clip, double lr, double beta1, double beta2,
                 double eps, double decay, bool decoupled) {
  if (params.empty()) return;
  Call call("adamw", params[0]);
  call.check(grads.size() == params.size() && averages.size() == params.size() && squares.size() == params.size(), "lists of one length");
  call.check(copies.empty() || copies.size() == params.size(), "copies of all parameters, or of none");
  call.check(is(count, Kind::f32) && is(skip, Kind::f32) && is(clip, Kind::f32), "count, skip and clip are float32");
  Adamw a;
  for (size_t i = 0; i < params.size(); ++i) {
    const I64 size = params[i].numel();
    call.check(grads[i].numel() == size && averages[i].numel() == size && squares[i].numel() == size, "sizes differ");
    call.check(is(params[i], Kind::f32) && is(averages[i], Kind::f32) && is(squares[i], Kind::f32), "parameters and moments are float32");
    call.check(like(grads[i], grads[0]), "gradients have one dtype");
    a.params.push_back(call.both(params[i])), a.averages.push_back(call.both(averages[i]));
    a.squares.push_back(call.both(squares[i])), a.grads.push_back(call.in(grads[i])), a.sizes.push_back(size);
    if (copies.empty()) continue;
    call.check(copies[i].numel() == size && like(copies[i], copies[0]), "copies have the sizes of parameters and one dtype");
    call.check(is(copies[i], Kind::bf16) || is(copies[i], Kind::f16), "copies are bfloat16 or float16");
    a.copies.push_back(call.both(copies[i]));  // stay as they are when the update is skipped
  }
  a.count = call.in(count), a.skip = call.in(skip), a.clip = call.in(clip);
  const auto f = [](double x) { return static_cast<float>(x); };
  a.lr = f(lr), a.beta1 = f(beta1), a.beta2 = f(beta2), a.rest1 = f(1 - beta1), a.rest2 = f(1 - beta2);
  a.log_beta1 = f(std::log(beta1)), a.log_beta2 = f(std::log(beta2)), a.eps = f(eps), a.decay = f(decay), a.decoupled = decoupled;
  adamw(a, call.stream());
  call.end();
}

void check_tokens(const Call& call, const Tensor& logits, std::initializer_list<const Tensor*> scalars) {
  call.check(logits.dim() == 2 && last(logits) < (1ll << 31), "logits are a matrix of less than 2^31 columns");
  for (const Tensor* one : scalars)
    call.check(one->numel() == logits.size(0) && is(*one, Kind::f32), "a float32 scalar for each token");
}

// Statistics of z = soft_cap(logits) / temperature over entries `begin ..`; no cap is 0.
void statistics(const Tensor& logits, const Tensor& labels, I64 begin, double temperature, double cap, const Tensor& top,
                const Tensor& total, const Tensor& label, const Maybe& moment) {
  Call call("cross_entropy_statistics", logits);
  check_tokens(call, logits, {&top, &total, &label, moment ? &*moment : &top});
  call.check(labels.numel() == logits.size(0) && is(labels, Kind::i64), "an int64 label for each token");
  cross_entropy_statistics({call.in(logits), call.in(labels), call.out(top), call.out(total), call.out(label),
                            call.out(moment), logits.size(0), last(logits), begin, static_cast<float>(temperature),
                            static_cast<float>(cap)}, call.stream());
  call.end();
}

// `out` may be the logits themselves.
void logit_gradient(const Tensor& logits, const Tensor& labels, I64 begin, double temperature, double cap, const Tensor& lse,
                    const Tensor& of_log_prob, const Maybe& entropy, const Maybe& of_entropy, const Maybe& of_logit,
                    const Tensor& out) {
  Call call("cross_entropy_gradient", logits);
  check_tokens(call, logits, {&lse, &of_log_prob, entropy ? &*entropy : &lse, of_entropy ? &*of_entropy : &lse, of_logit ? &*of_logit : &lse});
  call.check(entropy.has_value() == of_entropy.has_value(), "an entropy comes with its gradient");
  call.check(labels.numel() == logits.size(0) && is(labels, Kind::i64) && out.numel() == logits.numel(), "labels or result do not fit");
  const bool same = out.data_ptr() == logits.data_ptr();
  const Array into = same ? call.both(out) : call.out(out);
  cross_entropy_gradient({same ? into : call.in(logits), call.in(labels), call.in(lse), call.in(of_log_prob), call.in(entropy),
                          call.in(of_entropy), call.in(of_logit), into, logits.size(0), last(logits), begin,
                          static_cast<float>(temperature), static_cast<float>(cap)}, call.stream());
  call.end();
}

void gather(const Tensor& x, const Tensor& order, const Maybe& weights, I64 copies, const Tensor& out) {
  Call call("moe_gather", x);
  call.check(x.dim() == 2 && out.dim() == 2 && last(out) == last(x) && out.size(0) == order.numel() && like(out, x), "shapes do not fit");
  call.check(is(order, Kind::i64) && is(weights, Kind::f32) && has(weights, x.size(0) * copies) && copies > 0, "order or weights do not fit");
  moe_gather({call.in(x), call.in(order), call.in(weights), call.out(out), out.size(0), last(x), copies}, call.stream());
  call.end();
}

void gather_sum(const Tensor& x, const Tensor& slots, const Maybe& weights, const Tensor& out) {
  Call call("moe_sum", x);
  call.check(x.dim() == 2 && slots.dim() == 2 && out.dim() == 2 && last(out) == last(x) && out.size(0) == slots.size(0) && like(out, x), "shapes do not fit");
  call.check(is(slots, Kind::i64) && is(weights, Kind::f32) && has(weights, slots.numel()), "slots or weights do not fit");
  moe_sum({call.in(x), call.in(slots), call.in(weights), call.out(out), out.size(0), last(x), last(slots)}, call.stream());
  call.end();
}

void gather_dot(const Tensor& x, const Tensor& slots, const Tensor& grad, const Tensor& out) {
  Call call("moe_dot", x);
  call.check(x.dim() == 2 && grad.dim() == 2 && slots.dim() == 2 && last(grad) == last(x) && like(grad, x), "shapes do not fit");
  call.check(is(slots, Kind::i64) && is(out, Kind::f32) && out.numel() == slots.numel() && grad.size(0) == slots.size(0), "slots do not fit");
  moe_dot({call.in(x), call.in(slots), call.in(grad), call.out(out), slots.size(0), last(x), last(slots)}, call.stream());
  call.end();
}

// out, a float32 that is zero, becomes the largest magnitude.
void amax(const Tensor& x, const Tensor& out) {
  Call call("fp8_amax", x);
  call.check(out.numel() == 1 && is(out, Kind::f32), "the result is a float32 scalar");
  fp8_amax(call.in(x), x.numel(), call.both(out), call.stream());
  call.end();
}

// x [R, C] by a given scale, or by scales made here, whose inverses are written: of rows (block_rows 0), of blocks of 128
// columns and 1 or 128 rows. `transposed` [C, R] not with scales of rows.
void quantise(const Tensor& x, const Maybe& scale, const Tensor& data, const Maybe& inverse, const Maybe& transposed,
              I64 block_rows, I64 margin, bool powers) {
  if (x.numel() == 0) return;  // what there is to write was made by the caller
  Call call("fp8_quantise", x);
  call.check(x.dim() == 2 && data.numel() == x.numel() && has(transposed, x.numel()) && like(transposed, data), "shapes do not fit");
  call.check(scale.has_value() != inverse.has_value() && is(scale, Kind::f32) && is(inverse, Kind::f32), "a float32 scale, or inverses to write");
  const I64 rows = x.size(0), columns = last(x), blocks = (columns + 127) / 128;
  call.check(block_rows == 0 || block_rows == 1 || block_rows == 128, "blocks of 1 or 128 rows");
  const I64 scales = block_rows == 0 ? rows : (rows + block_rows - 1) / block_rows * blocks;
  call.check(scale ? scale->numel() == 1 : inverse->numel() == scales, "another number of scales");
  call.check(!transposed || scale || block_rows == 128, "a transpose has the scales of a tensor or of square blocks");
  call.check((rows + 127) / 128 <= 65535 && margin >= 0 && margin < 64, "too many rows, or no such margin");
  fp8_quantise({call.in(x), call.in(scale), call.out(data), call.out(inverse), call.out(transposed), rows, columns,
                static_cast<int>(block_rows), static_cast<int>(margin), powers}, call.stream());
  call.end();
}

void dequantise(const Tensor& codes, const Tensor& scales, const Tensor& outer, const Tensor& mean, const Tensor& levels,
                const Tensor& table, I64 runs, I64 length, I64 begin, I64 stride, const Tensor& out) {
  Call call("nf4_dequantise", out);
  call.check(out.numel() == runs * length && codes.numel() == (runs * length + 1) / 2, "codes are two a byte");
  call.check(runs < 2 || length % 64 == 0, "runs are whole blocks of 64");
  call.check(begin % 64 == 0 && stride % 64 == 0 && scales.numel() == runs * ((length + 63) / 64), "a scale for each block");
  call.check(is(codes, Kind::u8) && is(scales, Kind::u8) && is(outer, Kind::f32) && is(mean, Kind::f32), "codes are bytes");
  call.check(is(levels, Kind::f32) && levels.numel() == 16 && is(table, Kind::f32) && table.numel() == 256, "tables of 16 and 256");
  call.check(runs == 0 || length == 0 || outer.numel() > (begin + stride * (runs - 1) + length - 1) / 64 / 256, "a factor for each 256 blocks");
  nf4_dequantise({call.in(codes), call.in(scales), call.in(outer), call.in(mean), call.in(levels), call.in(table),
                  call.out(out), runs, length, begin, stride}, call.stream());
  call.end();
}

// q [n, H, E], pools keys and values [K, positions, E], table [n, blocks], lengths [n] of positions that are seen, its
// own among them; parts [n, H, splits, E + 2] is room. window and cap: 0 for none.
void attend(const Tensor& q, const Tensor& keys, const Tensor& values, const Tensor& table, const Tensor& lengths,
            const Maybe& sinks, I64 window, double cap, const Tensor& parts, const Tensor& out) {
  Call call("paged_attention", q);
  call.check(q.dim() == 3 && keys.dim() == 3 && values.dim() == 3 && table.dim() == 2 && parts.dim() == 4, "shapes do not fit");
  const I64 rows = q.size(0), heads = q.size(1), size = q.size(2), kv_heads = keys.size(0), splits = parts.size(2);
  call.check(last(keys) == size && values.numel() == keys.numel() && size > 0 && size <= 256, "heads have at most 256 features");
  call.check(kv_heads > 0 && heads % kv_heads == 0 && kv_heads * ((heads / kv_heads + 3) / 4) <= 65535, "heads do not share keys evenly");
  call.check(table.size(0) == rows && lengths.numel() == rows && is(table, Kind::i64) && is(lengths, Kind::i64), "table or lengths do not fit");
  call.check(splits > 0 && splits <= 65535 && parts.numel() == rows * heads * splits * (size + 2) && is(parts, Kind::f32), "no room for parts");
  call.check(like(keys, q) && like(values, q) && like(out, q) && out.numel() == q.numel() && is(sinks, Kind::f32) && has(sinks, heads), "a dtype or a size differs");
  paged_attention({call.in(q), call.in(keys), call.in(values), call.in(table), call.in(lengths), call.in(sinks), call.out(parts),
                   call.out(out), rows, heads, kv_heads, size, keys.size(1), table.size(1), splits, window,
                   static_cast<float>(cap)}, call.stream());
  call.end();
}

}  // namespace

// Must equal CUDA_VERSION of megallm/base/extension.py, so that a stale build is never used.
extern "C" int megallm_cuda_version() { return 1; }

STABLE_TORCH_LIBRARY(OPERATIONS, m) {
  m.def(
      "norm(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps, Tensor(a!) y, Tensor(b!)? sum, "
      "Tensor(c!)? mean, Tensor(d!) scale) -> ()");
  m.def(
      "norm_backward(Tensor grad, Tensor? grad_sum, Tensor x, Tensor weight, Tensor? mean, Tensor scale, "
      "Tensor(a!) grad_x, Tensor(b!) grad_weight, Tensor(c!)? grad_bias) -> ()");
  m.def("rope(Tensor x, Tensor cos, Tensor sin, Tensor? weight, float eps, float sign, Tensor(a!) out) -> ()");
  m.def(
      "norm_rope_backward(Tensor grad, Tensor x, Tensor cos, Tensor sin, Tensor weight, float eps, Tensor(a!) grad_x, "
      "Tensor(b!) grad_weight) -> ()");
  m.def("swiglu(Tensor gate_up, Tensor? grad, Tensor(a!) out) -> ()");
  m.def(
      "adamw(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] averages, Tensor(c!)[] squares, Tensor(d!)[] copies, "
      "Tensor count, Tensor skip, Tensor? clip, float lr, float beta1, float beta2, float eps, float decay, "
      "bool decoupled) -> ()");
  m.def(
      "cross_entropy_statistics(Tensor logits, Tensor labels, int begin, float temperature, float cap, Tensor(a!) top, "
      "Tensor(b!) total, Tensor(c!) label, Tensor(d!)? moment) -> ()");
  m.def(
      "cross_entropy_gradient(Tensor logits, Tensor labels, int begin, float temperature, float cap, Tensor lse, "
      "Tensor of_log_prob, Tensor? entropy, Tensor? of_entropy, Tensor? of_logit, Tensor(a!) out) -> ()");
  m.def("moe_gather(Tensor x, Tensor order, Tensor? weights, int copies, Tensor(a!) out) -> ()");
  m.def("moe_sum(Tensor x, Tensor slots, Tensor? weights, Tensor(a!) out) -> ()");
  m.def("moe_dot(Tensor x, Tensor slots, Tensor grad, Tensor(a!) out) -> ()");
  m.def("fp8_amax(Tensor x, Tensor(a!) out) -> ()");
  m.def(
      "fp8_quantise(Tensor x, Tensor? scale, Tensor(a!) data, Tensor(b!)? inverse, Tensor(c!)? transposed, "
      "int block_rows, int margin, bool powers) -> ()");
  m.def(
      "nf4_dequantise(Tensor codes, Tensor scales, Tensor outer, Tensor mean, Tensor levels, Tensor table, int runs, "
      "int length, int begin, int stride, Tensor(a!) out) -> ()");
  m.def(
      "paged_attention(Tensor q, Tensor keys, Tensor values, Tensor table, Tensor lengths, Tensor? sinks, int window, "
      "float cap, Tensor(a!) parts, Tensor(b!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(OPERATIONS, DEVICE_KEY, m) {
  m.impl("norm", TORCH_BOX(&norm));
  m.impl("norm_backward", TORCH_BOX(&norm_grad));
  m.impl("rope", TORCH_BOX(&rotate));
  m.impl("norm_rope_backward", TORCH_BOX(&rotate_grad));
  m.impl("swiglu", TORCH_BOX(&swiglu_both));
  m.impl("adamw", TORCH_BOX(&adamw_lists));
  m.impl("cross_entropy_statistics", TORCH_BOX(&statistics));
  m.impl("cross_entropy_gradient", TORCH_BOX(&logit_gradient));
  m.impl("moe_gather", TORCH_BOX(&gather));
  m.impl("moe_sum", TORCH_BOX(&gather_sum));
  m.impl("moe_dot", TORCH_BOX(&gather_dot));
  m.impl("fp8_amax", TORCH_BOX(&amax));
  m.impl("fp8_quantise", TORCH_BOX(&quantise));
  m.impl("nf4_dequantise", TORCH_BOX(&dequantise));
  m.impl("paged_attention", TORCH_BOX(&attend));
}
