// Backward of softmax cross-entropy; equations in cross_entropy.h.
//
// The softmax follows from the statistics that forward left, so that every logit stands alone: a row's threads walk
// along it once, as many as in forward. The gradient may take the logits' place. Vectors need logits and gradient to
// lie alike in their 16 bytes, as they do unless one of them is a part of something larger; else every element is its
// own.
//
// Bytes of global memory per row of V logits of e bytes: 2Ve; 20 beside. Rows that are ignored are written only.
#include "common/kernel_attributes.h"
#include "cross_entropy/cross_entropy.h"
#include "cross_entropy/row.cuh"

namespace fastlm {
namespace {

template <typename T, bool kGeneral>
__global__ void __launch_bounds__(kMaxThreads, 2)
    cross_entropy_bwd_kernel(const __grid_constant__ CrossEntropyBwdParams p) {
  const int64_t rows = p.rows.count(), step = int64_t{gridDim.x} * blockDim.y;
  const float* divisors = static_cast<const float*>(p.divisors);
  const float* grad_losses = static_cast<const float*>(p.grad_loss);
  for (int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; row < rows; row += step) {
    const T* logits = static_cast<const T*>(p.logits) + p.rows.offset(row, p.logits_strides);
    T* grad = static_cast<T*>(p.grad) + p.rows.offset(row, p.grad_strides);
    const RowTarget<CrossEntropyBwdParams> target(p, row);
    const float* stats = static_cast<const float*>(p.stats) + row;
    const float grad_loss = grad_losses[p.grad_per_row ? row : 0];
    const float scale = grad_loss * reciprocal(divisors);
    const float z_scale = grad_loss * reciprocal(divisors == nullptr ? nullptr : divisors + 1);
    const RowGradient gradient = {stats[0], stats[p.stats_stride], stats[2 * p.stats_stride], scale, z_scale};
    store_gradient<T, kGeneral>(p, target, gradient, logits, grad);
  }
}

template <typename T>
void register_kernels() {
  const std::string type = std::string("<") + kTypeName<T>;
  register_kernel("cross_entropy_bwd" + type + ", indices>", cross_entropy_bwd_kernel<T, false>, kMaxThreads);
  register_kernel("cross_entropy_bwd" + type + ", general>", cross_entropy_bwd_kernel<T, true>, kMaxThreads);
}

const bool registered = [] {
  register_kernels<float>();
  register_kernels<__nv_bfloat16>();
  register_kernels<__half>();
  return true;
}();

}  // namespace

const char* cross_entropy_bwd(const CrossEntropyBwdParams& p, int device, void* stream) {
  return dispatch_logits(p, [&](auto t, auto general) {
    const dim3 block = block_of_logits(p.cols);
    const auto kernel = cross_entropy_bwd_kernel<decltype(t), decltype(general)::value != 0>;
    return launch(kernel, grid_for(p.rows.count(), block), block, p, device, stream);
  });
}

}  // namespace fastlm
