// From products of query and key to scores on the CPU: scale, soft cap, ALiBi, masks and who sees whom. And what
// forward and backward share beside them.
#pragma once

#include "attention/product_cpu.h"
#include "attention/sequence.h"
#include "common/cpu_rows.h"

namespace fastlm {
namespace {

constexpr float kLog2e = 1.4426950408889634f;

// e^(s * unit + less) of words K, `unit` and `less` times kUnits. Of fp32 in units of e, in which large scores keep
// their digits, and exactly 1 where less is what -s * unit is rounded to; of bf16 in units of 2, with fewer operations.
template <typename K>
constexpr float kUnits = K::kPer == 1 ? 1.0f : kLog2e;

template <typename K>
inline Vec<float> exponential(Vec<float> s, Vec<float> unit, Vec<float> less) {
  return K::kPer == 1 ? exp2((s * unit + less) * kLog2e) : exp2<4>(multiply_add(s, unit, less));
}

// Places of a row, or rows of a tile.
struct Span {
  int start, stop;

  bool some() const { return start < stop; }
  int count() const { return stop - start; }
  bool covers(int first, int last) const { return start <= first && last <= stop; }
};

// Pairs of a query and a key in a row: of one query with keys that follow each other, or the other way round.
struct PairsInRow {
  int head, query, key;
  bool along_keys;
  int count;  // of those that exist

  int query_step() const { return along_keys ? 0 : 1; }
  int key_step() const { return along_keys ? 1 : 0; }
};

class Scores {
 public:
  float unit;  // what products are yet to be multiplied by: all there is to scores, unless they are general

  Scores(const AttentionProblem& p, const AttentionMask& mask)
      : p_(p), mask_(mask), scale_(static_cast<float>(p.scale)), cap_(static_cast<float>(p.softcap)) {
    // By a scale of 0 or less -inf, which is not seen, would not stay what it is.
    general_ = cap_ != 0.0f || p.alibi_slopes != nullptr || mask.mask != nullptr || !(scale_ > 0.0f);
    unit = general_ ? 1.0f : scale_;
  }

  // Whether scores are more than products.
  bool general() const { return general_; }
  bool capped() const { return cap_ != 0.0f; }

  // What is seen of a row that goes on, from where it begins.
  static Span seen_in(const Sequence& sequence, const PairsInRow& pairs) {
    if (pairs.along_keys) {
      return {sequence.first_seen(pairs.query) - pairs.key, sequence.last_seen(pairs.query) + 1 - pairs.key};
    }
    return {sequence.first_to_see(pairs.key) - pairs.query, sequence.last_to_see(pairs.key) + 1 - pairs.query};
  }

  // Finishes `cols` scores, a multiple of kLane; those not to be seen become -inf. If `slopes` is given it gets by what
  // the soft cap multiplies gradients.
  void finish(const Sequence& sequence, const PairsInRow& pairs, int cols, float* s, float* slopes) const {
    if (general_) finish_general(sequence, pairs, cols, s, slopes);
    const Span seen = seen_in(sequence, pairs);
    for (int at = 0; at < smaller(seen.start, cols); ++at) s[at] = -INFINITY;
    for (int at = larger(seen.stop, 0); at < cols; ++at) s[at] = -INFINITY;
  }

 private:
  const AttentionProblem& p_;
  const AttentionMask& mask_;
  float scale_, cap_;
  bool general_;

  void finish_general(const Sequence& sequence, const PairsInRow& pairs, int cols, float* s, float* slopes) const {
    for (int at = 0; at < cols; at += kLane) {
      Vec<float> x = load(s + at);
      if (capped()) {
        const Vec<float> ratio = tanh(x * (scale_ / cap_));
        x = ratio * cap_;
        if (slopes != nullptr) store(slopes + at, 1.0f - ratio * ratio);
      } else {
        x *= scale_;
      }
      store(s + at, x);
    }
    if (p_.alibi_slopes != nullptr) {
      const float slope = p_.alibi_slopes[int64_t{sequence.number} * p_.heads + pairs.head];
      const int distance = pairs.query + sequence.offset - pairs.key, step = pairs.query_step() - pairs.key_step();
      for (int at = 0; at < cols; ++at) s[at] -= slope * static_cast<float>(abs(distance + at * step));
    }
    if (mask_.mask == nullptr) return;
    const int64_t* const strides = mask_.mask_strides.at;
    const int64_t offset =
        sequence.batch * strides[0] + pairs.head * strides[1] + pairs.query * strides[2] + pairs.key * strides[3];
    const int64_t stride = pairs.query_step() * strides[2] + pairs.key_step() * strides[3];
    const int count = smaller(cols, pairs.count);
    if (mask_.boolean) {
      const bool* const mask = static_cast<const bool*>(mask_.mask) + offset;
      for (int at = 0; at < count; ++at) s[at] = mask[at * stride] ? s[at] : -INFINITY;
    } else if (mask_.mask_dtype == DType::kFloat32) {
      add(static_cast<const float*>(mask_.mask) + offset, stride, count, s);
    } else if (mask_.mask_dtype == DType::kBFloat16) {
      add(static_cast<const BFloat16*>(mask_.mask) + offset, stride, count, s);
    } else {
      add(static_cast<const Half*>(mask_.mask) + offset, stride, count, s);
    }
  }

  template <typename T>
  static void add(const T* mask, int64_t stride, int count, float* s) {
    for (int at = 0; at < count; at += kLane) {
      T row[kLane] = {};
      for (int i = 0; i < smaller(count - at, kLane); ++i) row[i] = mask[(at + i) * stride];
      store(s + at, load(s + at) + load(row));
    }
  }
};

// -inf instead of those scores in registers that are not seen: a span of each row.
template <int kRows, int kColumns>
inline __attribute__((always_inline)) void hide(const Span* seen, Registers<kRows, kColumns>& s) {
  typedef Vec<int32_t> Lanes;
  Lanes lane;
  for (int i = 0; i < kLane; ++i) lane[i] = i;
  FASTLM_UNROLL for (int r = 0; r < kRows; ++r) {
    const Lanes start = broadcast<int32_t>(seen[r].start), stop = broadcast<int32_t>(seen[r].stop);
    FASTLM_UNROLL for (int n = 0; n < kColumns; ++n) {
      const Lanes at = lane + n * kLane;
      s[r][n] = (at >= start) & (at < stop) ? s[r][n] : broadcast<float>(-INFINITY);
    }
  }
}

// Rows of a head.
template <typename T>
RowsOf<T> query_rows(const Sequence& sequence, const void* tensor, const Four& strides, int head, int64_t cols) {
  return {sequence.query_rows(static_cast<const T*>(tensor), strides, head), strides.at[2], cols};
}
template <typename T>
RowsOf<T> key_rows(const Sequence& sequence, const void* tensor, const Four& strides, int head, int64_t cols) {
  return {sequence.key_rows(static_cast<const T*>(tensor), strides, head), strides.at[2], cols};
}
template <typename T>
RowsOf<T> from_row(const RowsOf<T>& rows, int64_t first) {
  return {rows.at + first * rows.row, rows.row, rows.cols};
}

// tasks(space) of each of so many threads, a Space{arguments...} for each; returns what is wrong, or null.
template <typename Space, typename Tasks, typename... Arguments>
const char* in_parallel(int threads, const Tasks& tasks, const Arguments&... arguments) {
  bool failed = false;
#pragma omp parallel num_threads(threads)
  {
    Space space(arguments...);
    const TileConfig config;
    if (space.failed()) {
#pragma omp atomic write
      failed = true;
    }
#pragma omp barrier
    if (!failed) tasks(space);
  }
  return failed ? "out of memory for the keys and queries to be laid out in" : nullptr;
}

}  // namespace
}  // namespace fastlm

#define FASTLM_DISPATCH(function, p)                             \
  if (p.dtype == DType::kFloat32) return function<float>(p);     \
  if (p.dtype == DType::kBFloat16) return function<BFloat16>(p); \
  return p.dtype == DType::kFloat16 ? function<Half>(p) : "attention is of fp32, bf16 and fp16";
