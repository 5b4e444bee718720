// A row of logits: how threads share it, what it is compared with, and its gradient.
#pragma once

#include "common/online_softmax.cuh"
#include "common/row_tile.cuh"
#include "common/vec.cuh"
#include "cross_entropy/cross_entropy.h"

namespace fastlm {

template <int kValue>
struct Width {
  static constexpr int value = kValue;
};

// (threads of a row, rows of a block): a long row is a whole block's.
inline dim3 block_of_logits(int64_t cols) {
  return cols > kMaxThreads * kElements ? dim3(kMaxThreads) : block_for(cols);
}

// body(width, column): all columns of a row, by threads in turn. Vectors of 16 bytes lie between the elements before
// the first that is aligned and those after the last; without `vectors` every element is its own.
template <typename T, typename F>
__device__ void for_columns(const T* row, int cols, bool vectors, const F& body) {
  constexpr int kWidth = kVector<T, T>;
  const int lane = threadIdx.x, lanes = blockDim.x;
  const uintptr_t to_aligned = -reinterpret_cast<uintptr_t>(row) % kMaxAccess;  // bytes
  int head = vectors ? static_cast<int>(to_aligned / sizeof(T)) : cols;
  head = head < cols ? head : cols;
  for (int column = lane; column < head; column += lanes) body(Width<1>{}, column);
  const int tail = cols - (cols - head) % kWidth;
  for (int column = head + lane * kWidth; column < tail; column += lanes * kWidth) body(Width<kWidth>{}, column);
  if (tail + lane < cols) body(Width<1>{}, tail + lane);
}

// Whether both can be accessed in vectors of 16 bytes at the same columns.
template <typename T>
__device__ bool go_together(const T* a, const T* b) {
  return (reinterpret_cast<uintptr_t>(a) - reinterpret_cast<uintptr_t>(b)) % kMaxAccess == 0;
}

// What a row is compared with; Params are those of forward or of backward.
template <typename Params>
class RowTarget {
 public:
  __device__ RowTarget(const Params& p, int64_t row)
      : p_(p),
        kept_(1.0f - static_cast<float>(p.label_smoothing)),
        share_(static_cast<float>(p.label_smoothing) / static_cast<float>(p.cols)) {
    if (p.probabilities) {
      offset_ = p.rows.offset(row, p.target_strides);
      return;
    }
    const int64_t target = static_cast<const int64_t*>(p.target)[row];
    ignored = target == p.ignore_index;
    if (ignored) return;
    device_assert(0 <= target && target < p.cols, "cross_entropy: target must be a class or ignore_index");
    column = static_cast<int>(target);
    float weight[1];
    load_parameter<1>(p.weight, p.weight_dtype, column, 1.0f, weight);
    at_target = kept_ * weight[0];
  }

  bool ignored = false;
  int column = -1;  // of the target, where q is at_target more than `spread` says
  float at_target = 0.0f;

  // q at a column, of what is spread over all of them.
  __device__ float spread(int at) const {
    float weight[1], q[1] = {0.0f};
    load_parameter<1>(p_.weight, p_.weight_dtype, at, 1.0f, weight);
    if (p_.probabilities) load_parameter<1>(p_.target, p_.target_dtype, offset_ + at, 0.0f, q);
    return (q[0] * kept_ + share_) * weight[0];
  }

 private:
  const Params& p_;
  float kept_, share_;  // of what is not smoothed; of a class, of what is
  int64_t offset_ = 0;
};

// Whether q is spread over all columns.
template <typename Params>
FASTLM_HOST_DEVICE bool spreads(const Params& p) {
  return p.probabilities || p.label_smoothing != 0.0;
}

// Neighbouring logits, after the soft cap.
template <bool kGeneral, int kWidth, typename T, typename Params>
__device__ void load_logits(const Params& p, const T* logits, float (&x)[kWidth]) {
  load<kWidth>(logits, x);
  if constexpr (kGeneral) {
    const float cap = static_cast<float>(p.softcap);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) x[i] = cap != 0.0f ? cap * tanhf(x[i] / cap) : x[i];
  }
}

// What a row's gradient needs: the statistics, and the upstream gradient.
struct RowGradient {
  float top, log, mass, scale, z_scale;

  // Of neighbouring logits x, which begin at `column`.
  template <bool kGeneral, int kWidth, typename Params>
  __device__ void operator()(const Params& p, const RowTarget<Params>& target, int column, const float (&x)[kWidth],
                             float (&grad)[kWidth]) const {
    const float through = mass * scale + 2.0f * static_cast<float>(p.z_loss) * (top + log) * z_scale;
    const float cap = static_cast<float>(p.softcap);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      grad[i] = exp_approx(x[i] - top - log) * through;
      if (kGeneral && spreads(p)) grad[i] -= target.spread(column + i) * scale;
      if (column + i == target.column) grad[i] -= target.at_target * scale;
      if (kGeneral && cap != 0.0f) grad[i] *= 1.0f - x[i] / cap * (x[i] / cap);
    }
  }
};

// 1 / divisor, for gradients: where the divisor is 0 no row has one. Null is 1.
__device__ inline float reciprocal(const float* divisor) {
  return divisor == nullptr || *divisor == 0.0f ? 1.0f : 1.0f / *divisor;
}

// Writes the gradient of a row, which may be where its logits are.
template <typename T, bool kGeneral, typename Params>
__device__ void store_gradient(const Params& p, const RowTarget<Params>& target, const RowGradient& gradient,
                               const T* logits, T* grad) {
  for_columns(logits, static_cast<int>(p.cols), go_together(logits, grad), [&](auto width, int column) {
    constexpr int kWidth = decltype(width)::value;
    float x[kWidth], g[kWidth] = {};
    if (!target.ignored) {
      load_logits<kGeneral, kWidth>(p, logits + column, x);
      gradient.template operator()<kGeneral, kWidth>(p, target, column, x, g);
    }
    store<kWidth>(grad + column, g);
  });
}

// function(T{}, kGeneral) for a dtype of logits. What is not general: class indices, neither smoothed nor soft-capped.
template <typename Params, typename F>
const char* dispatch_logits(const Params& p, const F& function) {
  if (p.cols > kMaxCols) return "too many classes";
  const auto with = [&](auto t) {
    return spreads(p) || p.softcap != 0.0 ? function(t, Width<1>{}) : function(t, Width<0>{});
  };
  if (p.dtype == DType::kFloat32) return with(float{});
  if (p.dtype == DType::kBFloat16) return with(__nv_bfloat16{});
  return p.dtype == DType::kFloat16 ? with(__half{}) : "does not serve these logits' dtype";
}

}  // namespace fastlm
