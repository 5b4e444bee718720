// Rows of the CPU kernels: how they are walked along, summed, written and shared out among threads. As in simd.h
// everything has internal linkage.
#pragma once

#include <cstdint>

#include <omp.h>

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

inline int threads_for(int64_t rows, int64_t cols) {
  if (rows * cols < kSmall) return 1;
  const int64_t most = omp_get_max_threads();
  return static_cast<int>(rows < most ? rows : most);
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
