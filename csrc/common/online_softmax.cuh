// Softmax of numbers that come one after another: their maximum so far, and the sum of their exponentials below it.
//
// Source: Milakov and Gimelshein 2018 (arXiv 1805.02867).
#pragma once

#include <cmath>

#include "common/device.cuh"

namespace fastlm {

constexpr float kLog2e = 1.4426950408889634f;

// e^x for x <= 0, where large negative x are exact zeros.
__device__ inline float exp_approx(float x) { return exp2_approx(x * kLog2e); }

class OnlineSoftmax {
 public:
  template <int N>
  __device__ void add(const float (&x)[N]) {
    float top = top_;
#pragma unroll
    for (int i = 0; i < N; ++i) top = fmaxf(top, x[i]);
    sum_ = sum_below(top);
#pragma unroll
    for (int i = 0; i < N; ++i) sum_ += exp_approx(x[i] - base(top));
    top_ = top;
  }

  __device__ float top() const { return top_; }  // -inf before the first

  // The sum of exp(x - top), for a top that is not below the own one.
  __device__ float sum_below(float top) const { return sum_ * exp_approx(top_ - base(top)); }

 private:
  // Where nothing but -inf has come, its distance to itself must not be NaN.
  __device__ static float base(float top) { return top == -INFINITY ? 0.0f : top; }

  float top_ = -INFINITY, sum_ = 0.0f;
};

}  // namespace fastlm
