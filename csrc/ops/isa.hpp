// The kernels of one instruction set. The including file has set the compiler's target, WIDTH (floats of a vector), PANEL
// (rows of a product held in registers), VECTOR_REGISTER and TABLE; standard headers stand before the target, so that none
// of their functions is compiled for it.

namespace megallm {
float* scratch_of(I64 floats);  // of this thread, until its next call
namespace {

#include "vector.hpp"

#include "attention.hpp"
#include "product.hpp"
#include "rows.hpp"

const Kernels kKernels = {
    TABLE,    WIDTH,    QUERIES,         KEYS, pack_keys, pack_queries, attention_forward,  attention_backward,
    rms_norm, rms_norm_backward, swiglu, swiglu_backward, rope, softmax_statistics, softmax_gradient,
    product,
};

}  // namespace
}  // namespace megallm
