// Softmax while the keys go by. Exponents are less by a number that is raised only where it has to be: not to every new
// maximum, but once a sum of a tile's exponentials says that they have become large. So the maximum of a tile is not
// even sought, its sums are needed anyhow, and what was summed is seldom scaled down. A row's first tile always raises.
#pragma once

#include <cfloat>
#include <cmath>

#include "attention/product.cuh"

namespace fastlm {

// Of M * 16 rows; [m][0] are of a fragment's rows group, [m][1] of rows group + 8.
template <typename T, int M>
class Softmax {
 public:
  __device__ Softmax() {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) base_[m][half] = -INFINITY, total_[m][half] = 0.0f;
    }
  }

  // Exponentials of scores in units of log2 / unit, as a first factor; scales down what was summed before, if it must.
  template <int N, int K>
  __device__ void operator()(const float (&s)[M][N][4], float unit, uint32_t (&p)[M][N / 2][4],
                             float (&sums)[M][K][4]) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
      float sum[2];
      const bool large = exponentials(s[m], unit, base_[m], p[m], sum);
      if (__any_sync(0xFFFFFFFFu, large)) {
        float usable[2];
        raise(m, s[m], unit, usable, sums[m]);
        exponentials(s[m], unit, usable, p[m], sum);
      }
      total_[m][0] += sum[0];
      total_[m][1] += sum[1];
    }
  }

  // After the last tile: the sum of a row's exponentials, and its log-sum-exp.
  __device__ float finish(int m, int half, float& lse) {
    float total = total_[m][half];
    total += __shfl_xor_sync(0xFFFFFFFFu, total, 1);
    total += __shfl_xor_sync(0xFFFFFFFFu, total, 2);
    lse = base_[m][half] * kLn2 + logf(total);
    return total;
  }

 private:
  static constexpr float kLarge = 256.0f;  // of a lane's sum over a tile: far from what fp16 can hold

  float base_[M][2];   // what exponents are less by, in units of log2; -inf: nothing was seen
  float total_[M][2];  // of the lane's columns

  // Returns whether a sum is large, or not a number, as where the base is -inf.
  template <int N>
  __device__ static bool exponentials(const float (&s)[N][4], float unit, const float (&base)[2],
                                      uint32_t (&p)[N / 2][4], float (&sum)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum[half] = 0.0f;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const float low = exp2_approx(fmaf(s[n][half * 2], unit, -base[half]));
        const float high = exp2_approx(fmaf(s[n][half * 2 + 1], unit, -base[half]));
        sum[half] += low + high;
        p[n / 2][n % 2 * 2 + half] = pack<T>(low, high);
      }
    }
    return !(sum[0] <= kLarge && sum[1] <= kLarge);
  }

  // Raises the base of 16 rows to their maxima.
  template <int N, int K>
  __device__ void raise(int m, const float (&s)[N][4], float unit, float (&usable)[2], float (&sums)[K][4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = -INFINITY;
#pragma unroll
      for (int n = 0; n < N; ++n) top = fmaxf(top, fmaxf(s[n][half * 2], s[n][half * 2 + 1]));
      top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, 2));
      const float raised = fmaxf(base_[m][half], top * unit);
      usable[half] = raised == -INFINITY ? 0.0f : fminf(raised, FLT_MAX);  // inf - inf is NaN
      const float factor = exp2_approx(base_[m][half] - usable[half]);
      base_[m][half] = raised;
      total_[m][half] *= factor;
#pragma unroll
      for (int k = 0; k < K; ++k) {
        sums[k][half * 2] *= factor;
        sums[k][half * 2 + 1] *= factor;
      }
    }
  }
};

}  // namespace fastlm
