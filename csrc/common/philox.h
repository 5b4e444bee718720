// Philox 4x32-10, the counter-based generator behind every dropout; fastlm/ops/philox.py is its definition. The mask of
// an element depends on (seed, offset), its row and its column, so that it is computed again in backward, never kept.
// Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/dtype.h"

namespace fastlm {

struct Philox4 {
  uint32_t at[4];

  // at[n], without an array in memory where n is not known to the compiler.
  FASTLM_HOST_DEVICE uint32_t pick(int n) const { return n < 2 ? (n == 0 ? at[0] : at[1]) : (n == 2 ? at[2] : at[3]); }
};

FASTLM_HOST_DEVICE inline Philox4 philox_4x32(Philox4 counter, uint64_t key) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  FASTLM_NO_UNROLL
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * counter.at[0], p1 = uint64_t{0xCD9E8D57u} * counter.at[2];
    counter = {{static_cast<uint32_t>(p1 >> 32) ^ counter.at[1] ^ k0, static_cast<uint32_t>(p1),
                static_cast<uint32_t>(p0 >> 32) ^ counter.at[3] ^ k1, static_cast<uint32_t>(p0)}};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return counter;
}

// Dropout of probability p: an element is kept if its word is at least the threshold, and then scaled.
struct Dropout {
  uint64_t threshold;
  float scale;

  explicit Dropout(double p)
      : threshold(static_cast<uint64_t>(std::nearbyint(p * 4294967296.0))), scale(static_cast<float>(scale_of(p))) {}

  static double scale_of(double p) { return p >= 1.0 ? 0.0 : 1.0 / (1.0 - p); }

  // The words of columns 4 * group to 4 * group + 3 of a row; rng_state is seed, offset.
  FASTLM_HOST_DEVICE static Philox4 words(const int64_t* rng_state, int64_t row, int64_t group) {
    const Philox4 counter = {{static_cast<uint32_t>(group), static_cast<uint32_t>(row),
                              static_cast<uint32_t>(row >> 32), static_cast<uint32_t>(rng_state[1])}};
    return philox_4x32(counter, static_cast<uint64_t>(rng_state[0]));
  }

  // A bit for each of N neighbours, the first at `column`, a multiple of N: whether it is kept. All are without
  // rng_state.
  template <int N>
  FASTLM_HOST_DEVICE uint32_t kept(const int64_t* rng_state, int64_t row, int64_t column) const {
    constexpr int kCall = N < 4 ? N : 4;
    if (rng_state == nullptr) return (1u << N) - 1;
    uint32_t bits = 0;
    for (int first = 0; first < N; first += kCall) {
      const Philox4 word = words(rng_state, row, (column + first) / 4);
      for (int i = 0; i < kCall; ++i) {
        const bool keep = word.pick(static_cast<int>((column + first + i) % 4)) >= threshold;
        bits |= static_cast<uint32_t>(keep) << (first + i);
      }
    }
    return bits;
  }

  // x after dropout; also its gradient: dropout is its own transpose.
  FASTLM_HOST_DEVICE float operator()(float x, bool keep) const { return keep ? x * scale : 0.0f; }
};

}  // namespace fastlm
