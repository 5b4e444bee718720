// From products of query and key to scores on the CPU: scale, soft cap, ALiBi, masks and who sees whom.
#pragma once

#include "attention/product_cpu.h"
#include "attention/sequence.h"

namespace fastlm {
namespace {

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

  // Finishes `cols` scores, a multiple of kLane; those not to be seen become -inf. If `slopes` is given it gets by what
  // the soft cap multiplies gradients.
  void finish(const Sequence& sequence, const PairsInRow& pairs, int cols, float* s, float* slopes) const {
    if (general_) finish_general(sequence, pairs, cols, s, slopes);
    int start, stop;  // of what is seen
    if (pairs.along_keys) {
      start = sequence.first_seen(pairs.query) - pairs.key, stop = sequence.last_seen(pairs.query) + 1 - pairs.key;
    } else {
      start = sequence.first_to_see(pairs.key) - pairs.query, stop = sequence.last_to_see(pairs.key) + 1 - pairs.query;
    }
    for (int at = 0; at < smaller(start, cols); ++at) s[at] = -INFINITY;
    for (int at = larger(stop, 0); at < cols; ++at) s[at] = -INFINITY;
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

}  // namespace
}  // namespace fastlm
