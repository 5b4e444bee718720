// Rows of the CPU kernels: how they are walked along, summed, written and shared out among threads. As in simd.h
// everything has internal linkage.
#pragma once

#include <cstdint>
#include <cstdlib>

#include <omp.h>

#include "common/philox.h"
#include "common/simd.h"

namespace fastlm {
namespace {

constexpr int64_t kSmall = 1 << 15;         // elements below which one thread is faster than waking the others
constexpr int64_t kBeyondCaches = 1 << 22;  // bytes from which on a result is written past the caches

// body(column, count, chain): all columns in steps of a vector; count is the number of lanes, and less at the end of a
// row. `chain` goes round kChains, so that as many sums can be under way at a time.
constexpr int kChains = 4;

template <typename A, typename F>
inline __attribute__((always_inline)) void for_columns(int64_t cols, const F& body) {
  constexpr int64_t kStep = kLanes<A>;
  int64_t column = 0;
  for (; column + kChains * kStep <= cols; column += kChains * kStep) {
    for (int chain = 0; chain < kChains; ++chain) body(column + chain * kStep, kStep, chain);
  }
  for (; column + kStep <= cols; column += kStep) body(column, kStep, 0);
  if (column < cols) body(column, cols - column, 0);
}

template <bool kValue>
struct Constant {
  static constexpr bool value = kValue;
};

// Sums under way.
template <typename A>
struct Sums {
  Vec<A> chains[kChains] = {};

  A total() const { return sum<A>((chains[0] + chains[1]) + (chains[2] + chains[3])); }
};

// As many threads as there are, and tasks, unless the work is less than waking them.
inline int threads_for(int64_t tasks, int64_t elements) {
  if (elements < kSmall) return 1;
  const int64_t most = omp_get_max_threads();
  return static_cast<int>(tasks < most ? tasks : most);
}

// Rows of A to work in, each at a multiple of 64 bytes, from the heap: none of the standard library's templates, see
// simd.h.
template <typename A>
class Workspace {
 public:
  Workspace(int64_t rows, int64_t cols)
      : stride_((cols + kLanes<A> - 1) / kLanes<A> * kLanes<A>),
        data_(static_cast<A*>(aligned_alloc(64, (rows * stride_ * sizeof(A) + 63) / 64 * 64))) {}
  ~Workspace() { free(data_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  bool failed() const { return data_ == nullptr; }
  A* row(int64_t n) const { return data_ + n * stride_; }

 private:
  int64_t stride_;
  A* data_;
};

// What dropout multiplies columns `first` to first + 63 of a row by. 16 calls of Philox at a time, which the compiler
// makes vectors of.
constexpr int kDropoutColumns = 64;

template <typename A>
void dropout_factors(double p, const int64_t* rng_state, int64_t row, int64_t first, A* factors) {
  constexpr int kCalls = kDropoutColumns / 4;
  const uint64_t threshold = Dropout(p).threshold;
  const A scale = static_cast<A>(Dropout::scale_of(p));
  uint32_t k0 = static_cast<uint32_t>(rng_state[0]), k1 = static_cast<uint32_t>(rng_state[0] >> 32);
  uint32_t c0[kCalls], c1[kCalls], c2[kCalls], c3[kCalls];
  for (int i = 0; i < kCalls; ++i) {
    c0[i] = static_cast<uint32_t>(first / 4 + i);
    c1[i] = static_cast<uint32_t>(row);
    c2[i] = static_cast<uint32_t>(row >> 32);
    c3[i] = static_cast<uint32_t>(rng_state[1]);
  }
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    for (int i = 0; i < kCalls; ++i) {
      const uint64_t p0 = uint64_t{0xD2511F53u} * c0[i], p1 = uint64_t{0xCD9E8D57u} * c2[i];
      c0[i] = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ k0;
      c1[i] = static_cast<uint32_t>(p1);
      c2[i] = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ k1;
      c3[i] = static_cast<uint32_t>(p0);
    }
  }
  for (int i = 0; i < kCalls; ++i) {
    factors[4 * i + 0] = c0[i] >= threshold ? scale : 0;
    factors[4 * i + 1] = c1[i] >= threshold ? scale : 0;
    factors[4 * i + 2] = c2[i] >= threshold ? scale : 0;
    factors[4 * i + 3] = c3[i] >= threshold ? scale : 0;
  }
}

// 0 where the factor is 0, even if x is infinite.
template <typename V>
inline V dropped(V x, V factor) {
  return factor != V{} ? x * factor : V{};
}

// A row of a result of `bytes` in all, written past the caches if the whole is larger than they are and the row is
// aligned.
template <typename T>
class Result {
 public:
  Result(T* row, int64_t bytes)
      : row_(row), past_caches_(bytes >= kBeyondCaches && reinterpret_cast<uintptr_t>(row) % sizeof(Packed<T>) == 0) {}

  void put(int64_t column, Vec<typename Arithmetic<T>::type> x, int64_t count) const {
    if (past_caches_ && count == kLanes<typename Arithmetic<T>::type>) return stream(row_ + column, x);
    store(row_ + column, x, count);
  }

 private:
  T* row_;
  bool past_caches_;
};

}  // namespace
}  // namespace fastlm
