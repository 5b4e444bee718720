// Which probabilities of a fragment dropout keeps. Four keys in a row share a call of the generator, and so do the
// lanes that hold them: each makes one call, of 4 bits, and shows it to the others.
#pragma once

#include "common/device.cuh"
#include "common/philox.h"

namespace fastlm {

// Of scores with queries along the rows: bit e for element e of the lane. `row` is the number of the fragment's row 0,
// and row_8 that of row 8; `key` that of column 0, a multiple of 8.
__device__ inline uint32_t kept_of_rows(const Dropout& dropout, const int64_t* rng_state, int64_t row, int64_t row_8,
                                        int key, int lane) {
  const bool odd = lane % 2;
  const uint32_t own = dropout.kept<4>(rng_state, odd ? row_8 : row, key + lane % 4 / 2 * 4);
  const uint32_t other = __shfl_xor_sync(0xFFFFFFFFu, own, 1);
  const uint32_t low = odd ? other : own, high = odd ? own : other;
  const int shift = odd ? 2 : 0;
  return (low >> shift & 3u) | (high >> shift & 3u) << 2;
}

// The same of scores with keys along the rows; `row` is the number of this lane's first column, `key` that of row 0.
__device__ inline uint32_t kept_of_columns(const Dropout& dropout, const int64_t* rng_state, int64_t row, int key,
                                           int lane) {
  const int mine = lane / 4 % 4;
  const uint32_t own = dropout.kept<4>(rng_state, row + mine % 2, key + mine / 2 * 8 + lane / 16 * 4);
  uint32_t bits = 0;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    bits |= (__shfl_sync(0xFFFFFFFFu, own, lane / 16 * 16 + e * 4 + lane % 4) >> mine & 1u) << e;
  }
  return bits;
}

// Two packed elements, of which those without their bit become 0.
__device__ inline uint32_t drop(uint32_t two, uint32_t bits) {
  return two & ((bits & 1u ? 0x0000FFFFu : 0u) | (bits & 2u ? 0xFFFF0000u : 0u));
}

}  // namespace fastlm
