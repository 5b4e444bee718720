// Forward of softmax cross-entropy, and the sum or mean of its losses; equations in cross_entropy.h.
//
// A row is read once: each thread keeps the maximum of its logits and the sum of their exponentials below it (online
// softmax), and the row's threads combine theirs at the end. Up to 512 columns a row is one warp's; from 8,192 on a
// block's 512 threads walk along it. Given divisors, they walk once more and write the gradient over the logits, which
// by then lie in the second level cache. The losses are summed by one block, in an order that depends on nothing.
//
// Bytes of global memory per row of V logits of e bytes: Ve, with the gradient 2Ve and Ve from cache; 24 beside. Rows
// that are ignored are not read.
#include "common/kernel_attributes.h"
#include "cross_entropy/cross_entropy.h"
#include "cross_entropy/row.cuh"

namespace fastlm {
namespace {

template <typename T, bool kGeneral>
__global__ void __launch_bounds__(kMaxThreads, 2)
    cross_entropy_fwd_kernel(const __grid_constant__ CrossEntropyFwdParams p) {
  FASTLM_SHARED(float, sums, [2][kMaxWarps]);
  FASTLM_SHARED(float, maxima, [2][kMaxWarps]);
  RowSum row_sum(sums);
  RowMax row_max(maxima);
  const int64_t rows = p.rows.count(), step = int64_t{gridDim.x} * blockDim.y;
  for (int64_t first = int64_t{blockIdx.x} * blockDim.y; first < rows; first += step) {
    const bool exists =
        first + threadIdx.y < rows;  // past the last row there is nothing to do, but barriers to meet at
    const int64_t row = exists ? first + threadIdx.y : first;
    T* logits = static_cast<T*>(p.logits) + p.rows.offset(row, p.logits_strides);
    const RowTarget<CrossEntropyFwdParams> target(p, row);
    float at_target[1] = {0.0f};
    if (exists && target.column >= 0 && threadIdx.x == 0)
      load_logits<kGeneral, 1>(p, logits + target.column, at_target);

    OnlineSoftmax softmax;
    float dot = 0.0f, spread = 0.0f;
    for_columns(logits, exists && !target.ignored ? static_cast<int>(p.cols) : 0, true, [&](auto width, int column) {
      constexpr int kWidth = decltype(width)::value;
      float x[kWidth];
      load_logits<kGeneral, kWidth>(p, logits + column, x);
      softmax.add(x);
      if constexpr (kGeneral) {
        if (!spreads(p)) return;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          const float q = target.spread(column + i);
          spread += q;
          dot += q * x[i];
        }
      }
    });
    const float top = row_max(softmax.top()), log = logf(row_sum(softmax.sum_below(top)));
    if (kGeneral) {
      spread = row_sum(spread);
      dot = row_sum(dot);
    }
    if (!exists) continue;
    const float mass = target.at_target + spread;
    if (threadIdx.x == 0) {
      float loss = (top - at_target[0] + log) * target.at_target;
      if (kGeneral) loss += top * spread - dot + log * spread;
      float* stats = static_cast<float*>(p.stats) + row;
      static_cast<float*>(p.losses)[row] = target.ignored ? 0.0f : loss;
      stats[0] = target.ignored ? 0.0f : top;
      stats[p.stats_stride] = target.ignored ? 0.0f : log;
      stats[2 * p.stats_stride] = mass;
    }
    if (p.divisors == nullptr) continue;
    __syncwarp();  // rows of one warp meet at no barrier: the target's logit has been read
    const float* divisors = static_cast<const float*>(p.divisors);
    const RowGradient gradient = {top, log, mass, reciprocal(divisors), reciprocal(divisors + 1)};
    store_gradient<T, kGeneral>(p, target, gradient, logits, logits);
  }
}

// One block.
__global__ void __launch_bounds__(kMaxThreads)
    cross_entropy_sum_kernel(const __grid_constant__ CrossEntropySumParams p) {
  FASTLM_SHARED(float, sums, [2][kMaxWarps]);
  RowSum row_sum(sums);
  float loss = 0.0f, z = 0.0f, weights = 0.0f;
  int64_t count = 0;
  for (int64_t row = threadIdx.x; row < p.rows; row += blockDim.x) {
    const int64_t target = p.target == nullptr ? 0 : p.target[row];
    if (p.target != nullptr && target == p.ignore_index) continue;
    ++count;
    if (p.weight != nullptr) {
      device_assert(0 <= target && target < p.cols, "cross_entropy: target must be a class or ignore_index");
      float weight[1];
      load_parameter<1>(p.weight, p.weight_dtype, target, 1.0f, weight);
      weights += weight[0];
    }
    if (p.losses == nullptr) continue;
    loss += static_cast<const float*>(p.losses)[row];
    if (p.z_loss == 0.0) continue;
    const float* stats = static_cast<const float*>(p.stats) + row;
    const float lse = stats[0] + stats[p.stats_stride];
    z += static_cast<float>(p.z_loss) * lse * lse;
  }
  loss = row_sum(loss);
  z = row_sum(z);
  const float valid = row_sum(static_cast<float>(count)), weighted = p.weight == nullptr ? valid : row_sum(weights);
  if (threadIdx.x != 0) return;
  if (p.divisors != nullptr) {
    static_cast<float*>(p.divisors)[0] = weighted;
    static_cast<float*>(p.divisors)[1] = valid;
    loss /= weighted;
    z /= valid;
  }
  if (p.loss != nullptr) *static_cast<float*>(p.loss) = p.z_loss == 0.0 ? loss : loss + z;
}

template <typename T>
void register_kernels() {
  const std::string type = std::string("<") + kTypeName<T>;
  register_kernel("cross_entropy_fwd" + type + ", indices>", cross_entropy_fwd_kernel<T, false>, kMaxThreads);
  register_kernel("cross_entropy_fwd" + type + ", general>", cross_entropy_fwd_kernel<T, true>, kMaxThreads);
}

const bool registered = [] {
  register_kernels<float>();
  register_kernels<__nv_bfloat16>();
  register_kernels<__half>();
  register_kernel("cross_entropy_sum", cross_entropy_sum_kernel, kMaxThreads);
  return true;
}();

}  // namespace

const char* cross_entropy_fwd(const CrossEntropyFwdParams& p, int device, void* stream) {
  return dispatch_logits(p, [&](auto t, auto general) {
    const dim3 block = block_of_logits(p.cols);
    const auto kernel = cross_entropy_fwd_kernel<decltype(t), decltype(general)::value != 0>;
    return launch(kernel, grid_for(p.rows.count(), block), block, p, device, stream);
  });
}

const char* cross_entropy_sum(const CrossEntropySumParams& p, int device, void* stream) {
  return launch(cross_entropy_sum_kernel, dim3(1), dim3(kMaxThreads), p, device, stream);
}

}  // namespace fastlm
