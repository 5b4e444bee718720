// From products of query and key to scores in units of log2: scale, soft cap, ALiBi and who sees whom.
#pragma once

#include "attention/sequence.h"

namespace fastlm {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Within 1e-7 of tanh.
__device__ inline float tanh_approx(float x) { return 1.0f - __fdividef(2.0f, 1.0f + exp2_approx(2.0f * kLog2e * x)); }

class Scores {
 public:
  float unit;  // what scores are multiplied by in the exponent, which saves a multiplication where this is all there is

  explicit Scores(const AttentionProblem& p)
      : scale_(static_cast<float>(p.scale)), softcap_(static_cast<float>(p.softcap)), alibi_(p.alibi_slopes) {
    // By a scale of 0 or less -inf, which is not seen, would not stay what it is.
    general_ = softcap_ != 0.0f || alibi_ != nullptr || !(scale_ > 0.0f);
    unit = general_ ? 1.0f : scale_ * kLog2e;
  }

  // Whether scores are more than products.
  __device__ bool general() const { return general_; }
  __device__ bool capped() const { return softcap_ != 0.0f; }
  __device__ bool biased() const { return alibi_ != nullptr; }
  __device__ float slope(int row) const { return alibi_[row] * kLog2e; }

  // Of a product, if general; and by what its gradient is multiplied.
  __device__ float scaled(float product) const { return product * (scale_ * kLog2e); }
  __device__ float cap(float product, float& slope) const {
    const float ratio = tanh_approx(product * (scale_ / softcap_));
    slope = 1.0f - ratio * ratio;
    return ratio * (softcap_ * kLog2e);
  }
  __device__ static float bias(float score, float slope, int distance) {
    return score - slope * static_cast<float>(abs(distance));
  }

 private:
  float scale_, softcap_;
  const float* alibi_;
  bool general_;
};

// function(m, n, e) for every element of fragments.
template <int M, int N, typename F>
__device__ void for_each_element(const F& function) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) function(m, n, e);
    }
  }
}

}  // namespace fastlm
