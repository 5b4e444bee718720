// Sums over the threads that share a row: blockDim is (threads of a row, rows of a block), the first a multiple of 32.
#pragma once

#include "common/device.cuh"

namespace fastlm {

constexpr int kWarp = 32;
constexpr int kMaxWarps = 32;  // of a block

// The sum of x over a warp, the same in all its lanes.
__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, lane);
  return x;
}

// Sums over rows. Every thread of the block calls it as often as the others, for rows of several warps meet at a
// barrier.
class RowSum {
 public:
  using Scratch = float[2][kMaxWarps];

  __device__ explicit RowSum(Scratch& scratch) : scratch_(scratch) {}

  // The sum of x over the threads of this row, the same in all of them: order and result do not depend on the grid.
  __device__ float operator()(float x) {
    x = warp_sum(x);
    const int warps = blockDim.x / kWarp;
    if (warps == 1) return x;
    // Two buffers in turn: between a read of one and the next write to it lies the barrier of the other.
    float* sums = scratch_[turn_];
    turn_ ^= 1;
    const int lane = threadIdx.x % kWarp, first = threadIdx.y * warps;
    if (lane == 0) sums[first + threadIdx.x / kWarp] = x;
    __syncthreads();
    return warp_sum(lane < warps ? sums[first + lane] : 0.0f);
  }

 private:
  Scratch& scratch_;
  int turn_ = 0;
};

}  // namespace fastlm
