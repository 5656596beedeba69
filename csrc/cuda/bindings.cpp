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

//--- further operations

}  // namespace

STABLE_TORCH_LIBRARY(OPERATIONS, m) {
  m.def(
      "norm(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps, Tensor(a!) y, Tensor(b!)? sum, "
      "Tensor(c!)? mean, Tensor(d!) scale) -> ()");
  m.def(
      "norm_backward(Tensor grad, Tensor? grad_sum, Tensor x, Tensor weight, Tensor? mean, Tensor scale, "
      "Tensor(a!) grad_x, Tensor(b!) grad_weight, Tensor(c!)? grad_bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(OPERATIONS, DEVICE_KEY, m) {
  m.impl("norm", TORCH_BOX(&norm));
  m.impl("norm_backward", TORCH_BOX(&norm_grad));
}
