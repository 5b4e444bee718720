// Sums and maxima over the threads that share a row: blockDim is (threads of a row, rows of a block), the first a
// multiple of 32.
#pragma once

#include <cmath>

#include "common/device.cuh"

namespace fastlm {

constexpr int kWarp = 32;
constexpr int kMaxWarps = 32;  // of a block

struct Sum {
  static constexpr float kIdentity = 0.0f;
  __device__ float operator()(float a, float b) const { return a + b; }
};

// Of NaN and a number the number.
struct Max {
  static constexpr float kIdentity = -INFINITY;
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// x of all lanes combined, the same in all of them.
template <typename Combine>
__device__ float warp_reduce(float x) {
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) x = Combine()(x, __shfl_xor_sync(0xFFFFFFFFu, x, lane));
  return x;
}

// Combines over rows. Every thread of the block calls it as often as the others, for rows of several warps meet at a
// barrier.
template <typename Combine>
class RowReduce {
 public:
  using Scratch = float[2][kMaxWarps];

  __device__ explicit RowReduce(Scratch& scratch) : scratch_(scratch) {}

  // x over the threads of this row, the same in all of them: order and result do not depend on the grid.
  __device__ float operator()(float x) {
    x = warp_reduce<Combine>(x);
    const int warps = blockDim.x / kWarp;
    if (warps == 1) return x;
    // Two buffers in turn: between a read of one and the next write to it lies the barrier of the other.
    float* partial = scratch_[turn_];
    turn_ ^= 1;
    const int lane = threadIdx.x % kWarp, first = threadIdx.y * warps;
    if (lane == 0) partial[first + threadIdx.x / kWarp] = x;
    __syncthreads();
    return warp_reduce<Combine>(lane < warps ? partial[first + lane] : Combine::kIdentity);
  }

 private:
  Scratch& scratch_;
  int turn_ = 0;
};

using RowSum = RowReduce<Sum>;
using RowMax = RowReduce<Max>;

}  // namespace fastlm
