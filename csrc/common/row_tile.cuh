// How rows are shared out among threads, in forward and backward: a thread has kElements of a row, in vectors of kWidth
// neighbours, so that neighbouring threads access neighbouring vectors. A row has as many warps as that takes; narrow
// rows share a block.
#pragma once

#include "common/device.cuh"
#include "common/philox.h"
#include "common/reduce.cuh"
#include "common/rows.h"

namespace fastlm {

constexpr int kElements = 16;             // of a row, per thread
constexpr int kMaxThreads = 512;          // of a block, so that a thread may have 128 registers
constexpr int kNarrowBlock = 256;         // threads that blocks of more than one row have
constexpr int64_t kMaxGrid = 0x7FFFFFFF;  // blocks

// Elements of a vector: 16 bytes of the wider type.
template <typename T, typename R>
constexpr int kVector = 16 / (sizeof(T) > sizeof(R) ? sizeof(T) : sizeof(R));

// (threads of a row, rows of a block).
inline dim3 block_for(int64_t cols) {
  const int threads = static_cast<int>((cols + kWarp * kElements - 1) / (kWarp * kElements)) * kWarp;
  return dim3(threads, threads < kNarrowBlock ? kNarrowBlock / threads : 1);
}

inline dim3 grid_for(int64_t rows, dim3 block) {
  const int64_t blocks = (rows + block.y - 1) / block.y;
  return dim3(static_cast<unsigned>(blocks < kMaxGrid ? blocks : kMaxGrid));
}

// The first column of this thread's n-th vector. A warp's are adjacent, so that the columns of a thread are a constant
// apart: one address in registers, not one per vector.
template <int kWidth>
__device__ inline int column_of(int vector) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  return warp * (kWarp * kElements) + vector * (kWarp * kWidth) + lane * kWidth;
}

// body(vector, column) for this thread's vectors that lie in the row.
template <int kWidth, typename F>
__device__ inline void for_vectors(int cols, const F& body) {
#pragma unroll
  for (int vector = 0; vector < kElements / kWidth; ++vector) {
    const int column = column_of<kWidth>(vector);
    if (column < cols) body(vector, column);
  }
}

// Which of this thread's elements dropout keeps, a bit each: found before the row is read, while registers are free.
template <int kWidth>
__device__ inline uint32_t kept_elements(const Dropout& dropout, const int64_t* rng_state, int64_t row) {
  if (rng_state == nullptr) return 0xFFFFFFFFu;
  uint32_t kept = 0;
  FASTLM_NO_UNROLL
  for (int vector = 0; vector < kElements / kWidth; ++vector) {
    kept |= dropout.kept<kWidth>(rng_state, row, column_of<kWidth>(vector)) << (vector * kWidth);
  }
  return kept;
}

}  // namespace fastlm
