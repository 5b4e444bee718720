// Softmax cross-entropy on the CPU; equations in cross_entropy.h.
//
// Rows are shared out among OpenMP's threads (torch's own pool), each row one thread's, so that the result does not
// depend on their number. Forward takes a row in blocks that the first level cache holds: the block's maximum, then the
// sum of its exponentials below the maximum so far (online softmax). Memory is read once. The gradient, of backward or
// in the logits' place after forward, follows from the statistics element by element.
//
// Bytes of memory per row of V logits of e bytes: forward Ve, with the gradient 2Ve, backward 2Ve. Results larger than
// the caches are written past them, in huge pages where they are fresh.
#include <cmath>

#include "common/cpu_rows.h"
#include "common/huge_pages.h"
#include "cross_entropy/cross_entropy.h"

namespace fastlm {
namespace {

constexpr int64_t kBlock = 4096;  // logits

// Elements of a parameter in whatever dtype it is; `missing` if there is none.
template <typename A>
Vec<A> load_any(const void* p, DType dtype, A missing, int64_t at, int64_t count) {
  if (p == nullptr) return broadcast<A>(missing);
  if constexpr (sizeof(A) == 8) {
    return load(static_cast<const double*>(p) + at, count);
  } else if (dtype == DType::kFloat32) {
    return load(static_cast<const float*>(p) + at, count);
  } else if (dtype == DType::kBFloat16) {
    return load(static_cast<const BFloat16*>(p) + at, count);
  } else {
    return load(static_cast<const Half*>(p) + at, count);
  }
}

// What a row is compared with; Params are those of forward or of backward.
template <typename A, typename Params>
struct RowTarget {
  const Params& p;
  int64_t column;  // of the target, where q is at_target more than `spread` says; -1 with probabilities
  A at_target;
  bool ignored, valid;
  int64_t offset;  // of the row of probabilities

  RowTarget(const Params& p, int64_t row) : p(p), column(-1), at_target(0), ignored(false), valid(true), offset(0) {
    if (p.probabilities) {
      offset = p.rows.offset(row, p.target_strides);
      return;
    }
    const int64_t target = static_cast<const int64_t*>(p.target)[row];
    ignored = target == p.ignore_index;
    valid = ignored || (0 <= target && target < p.cols);
    if (ignored || !valid) return;
    column = target;
    at_target = static_cast<A>(1 - p.label_smoothing) * load_any<A>(p.weight, p.weight_dtype, 1, target, 1)[0];
  }

  bool spreads() const { return p.probabilities || p.label_smoothing != 0; }

  // q at some columns, of what is spread over all of them.
  Vec<A> spread(int64_t at, int64_t count) const {
    Vec<A> q = broadcast<A>(static_cast<A>(p.label_smoothing / p.cols));
    if (p.probabilities) {
      const Vec<A> t = load_any<A>(p.target, p.target_dtype, 0, offset + at, count);
      q = multiply_add(t, broadcast<A>(static_cast<A>(1 - p.label_smoothing)), q);
    }
    return first<A>(q * load_any<A>(p.weight, p.weight_dtype, 1, at, count), count);
  }
};

template <typename A, typename T, typename Params>
Vec<A> load_logits(const Params& p, const T* logits, int64_t count) {
  const Vec<A> x = load(logits, count);
  const A cap = static_cast<A>(p.softcap);
  return cap == 0 ? x : cap * tanh(x / cap);
}

template <typename A>
A exp_of(A x) {
  return exp(broadcast<A>(x))[0];
}

template <typename A>
struct RowStats {
  A top, log, mass;
};

// What a row's gradient needs besides.
template <typename A>
struct Upstream {
  A scale, z_scale;
};

// 1 / divisor, for gradients: where the divisor is 0 no row has one. Null is 1.
template <typename A>
Upstream<A> upstream(A grad_loss, const void* divisors) {
  const A* d = static_cast<const A*>(divisors);
  const auto over = [&](int n) { return d == nullptr || d[n] == 0 ? grad_loss : grad_loss / d[n]; };
  return {over(0), over(1)};
}

// Forward ------------------------------------------------------------------------------------------------------------

// kGeneral: probabilities, label smoothing or a soft cap.
template <typename T, bool kGeneral, typename A>
RowStats<A> fwd_row(const CrossEntropyFwdParams& p, const T* logits, const RowTarget<A, CrossEntropyFwdParams>& target,
                    A& loss) {
  const A x_target = target.column < 0 ? 0 : load_logits<A>(p, logits + target.column, 1)[0];
  A top = -INFINITY, sum_below = 0, dot = 0, spread = 0;
  alignas(64) A capped[kGeneral ? kBlock + kLanes<A> : 1];
  for (int64_t begin = 0; begin < p.cols; begin += kBlock) {
    const int64_t cols = p.cols - begin < kBlock ? p.cols - begin : kBlock;
    Vec<A> tops[kChains];
    for (Vec<A>& chain : tops) chain = broadcast<A>(top);
    Sums<A> dots, spreads;
    for_columns<A>(cols, [&](int64_t c, int64_t count, int chain) {
      const Vec<A> x = load_logits<A>(p, logits + begin + c, count);
      tops[chain] = max(first<A>(x, count, -INFINITY), tops[chain]);
      if constexpr (kGeneral) {
        store(capped + c, x);
        if (!target.spreads()) return;
        const Vec<A> q = target.spread(begin + c, count);
        spreads.chains[chain] += q;
        dots.chains[chain] = multiply_add(q, x, dots.chains[chain]);
      }
    });
    const A above = largest<A>(max(max(tops[0], tops[1]), max(tops[2], tops[3])));
    const A base = above == -INFINITY ? 0 : above;  // the distance of -inf to itself must not be NaN
    Sums<A> sums;
    for_columns<A>(cols, [&](int64_t c, int64_t count, int chain) {
      Vec<A> x;
      if constexpr (kGeneral) {
        x = load(capped + c);
      } else {
        x = load(logits + begin + c, count);
      }
      sums.chains[chain] += first<A>(exp(x - base), count);
    });
    sum_below = sum_below * exp_of(top - base) + sums.total();
    top = above;
    spread += spreads.total();
    dot += dots.total();
  }
  const A log = std::log(sum_below);
  loss = (top - x_target + log) * target.at_target;
  if (target.spreads()) loss += top * spread - dot + log * spread;
  return {top, log, target.at_target + spread};
}

// Writes a row's gradient, which may be where its logits are.
template <typename T, bool kGeneral, typename A, typename Params>
void gradient_row(const Params& p, const RowTarget<A, Params>& target, const RowStats<A>& stats, const Upstream<A>& up,
                  const T* logits, T* grad, const Result<T>& result) {
  if (target.ignored) {
    memset(static_cast<void*>(grad), 0, p.cols * sizeof(T));
    return;
  }
  const A through = stats.mass * up.scale + 2 * static_cast<A>(p.z_loss) * (stats.top + stats.log) * up.z_scale;
  const A cap = static_cast<A>(p.softcap);
  const auto at = [&](int64_t c, int64_t count) {
    const Vec<A> x = load_logits<A>(p, logits + c, count);
    Vec<A> g = exp(x - stats.top - stats.log) * through;
    if constexpr (kGeneral) {
      if (target.spreads()) g -= target.spread(c, count) * up.scale;
      if (cap != 0) g *= 1 - x / cap * (x / cap);
    }
    return g;
  };
  Vec<A> at_target{};  // before the gradient takes the logit's place
  if (target.column >= 0) {
    Vec<A> below = broadcast<A>(target.at_target * up.scale);
    if (cap != 0) {
      const Vec<A> x = load_logits<A>(p, logits + target.column, 1) / cap;
      below *= 1 - x * x;
    }
    at_target = at(target.column, 1) - below;
  }
  for_columns<A>(p.cols, [&](int64_t c, int64_t count, int) { result.put(c, at(c, count), count); });
  if (target.column >= 0) store(grad + target.column, at_target, 1);
}

template <typename T, bool kGeneral>
const char* fwd(const CrossEntropyFwdParams& p) {
  using A = typename Arithmetic<T>::type;
  const int64_t rows = p.rows.count();
  A* all_stats = static_cast<A*>(p.stats);
  bool valid = true;
#pragma omp parallel for num_threads(threads_for(rows, rows* p.cols)) schedule(static) reduction(&& : valid)
  for (int64_t row = 0; row < rows; ++row) {
    const RowTarget<A, CrossEntropyFwdParams> target(p, row);
    valid = valid && target.valid;
    T* logits = static_cast<T*>(p.logits) + p.rows.offset(row, p.logits_strides);
    A loss = 0;
    RowStats<A> stats = {};
    if (!target.ignored && target.valid) stats = fwd_row<T, kGeneral>(p, logits, target, loss);
    static_cast<A*>(p.losses)[row] = loss;
    all_stats[row] = stats.top;
    all_stats[row + p.stats_stride] = stats.log;
    all_stats[row + 2 * p.stats_stride] = stats.mass;
    if (p.divisors == nullptr || !target.valid) continue;
    gradient_row<T, kGeneral>(p, target, stats, upstream<A>(1, p.divisors), logits, logits, Result<T>(logits, 0));
  }
  return valid ? nullptr : kTargetOutOfRange;
}

template <typename A>
const char* sum_losses(const CrossEntropySumParams& p) {
  const A *losses = static_cast<const A*>(p.losses), *stats = static_cast<const A*>(p.stats);
  double loss = 0, z = 0, weights = 0;
  int64_t count = 0;
  for (int64_t row = 0; row < p.rows; ++row) {
    const int64_t target = p.target == nullptr ? 0 : p.target[row];
    if (p.target != nullptr && target == p.ignore_index) continue;
    ++count;
    if (p.weight != nullptr) {
      if (target < 0 || target >= p.cols) return kTargetOutOfRange;
      weights += load_any<A>(p.weight, p.weight_dtype, 1, target, 1)[0];
    }
    if (losses == nullptr) continue;
    loss += losses[row];
    if (p.z_loss == 0) continue;
    const double lse = stats[row] + stats[row + p.stats_stride];
    z += p.z_loss * lse * lse;
  }
  const double valid = static_cast<double>(count), weighted = p.weight == nullptr ? valid : weights;
  if (p.divisors != nullptr) {
    static_cast<A*>(p.divisors)[0] = static_cast<A>(weighted);
    static_cast<A*>(p.divisors)[1] = static_cast<A>(valid);
    loss /= weighted;
    z /= valid;
  }
  if (p.z_loss != 0) loss += z;
  if (p.loss != nullptr) *static_cast<A*>(p.loss) = static_cast<A>(loss);
  return nullptr;
}

// Backward -----------------------------------------------------------------------------------------------------------

template <typename T, bool kGeneral>
const char* bwd(const CrossEntropyBwdParams& p) {
  using A = typename Arithmetic<T>::type;
  const int64_t rows = p.rows.count();
  const A *all_stats = static_cast<const A*>(p.stats), *grad_loss = static_cast<const A*>(p.grad_loss);
  const bool in_place = p.grad == p.logits;
  const int64_t bytes = in_place ? 0 : rows * p.cols * int64_t{sizeof(T)};
  prefer_huge_pages(p.grad, bytes);
  bool valid = true;
#pragma omp parallel num_threads(threads_for(rows, rows* p.cols)) reduction(&& : valid)
  {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
      const RowTarget<A, CrossEntropyBwdParams> target(p, row);
      valid = valid && target.valid;
      if (!target.valid) continue;
      const T* logits = static_cast<const T*>(p.logits) + p.rows.offset(row, p.logits_strides);
      T* grad = static_cast<T*>(p.grad) + p.rows.offset(row, p.grad_strides);
      const RowStats<A> stats = {all_stats[row], all_stats[row + p.stats_stride], all_stats[row + 2 * p.stats_stride]};
      const Upstream<A> up = upstream<A>(grad_loss[p.grad_per_row ? row : 0], p.divisors);
      gradient_row<T, kGeneral>(p, target, stats, up, logits, grad, Result<T>(grad, bytes));
    }
    stream_end();
  }
  return valid ? nullptr : kTargetOutOfRange;
}

// The instantiation for the dtype of the logits.
#define FASTLM_DISPATCH(function, p)                                                \
  const bool general = p.probabilities || p.label_smoothing != 0 || p.softcap != 0; \
  switch (p.dtype) {                                                                \
    case DType::kFloat64:                                                           \
      return general ? function<double, true>(p) : function<double, false>(p);      \
    case DType::kFloat32:                                                           \
      return general ? function<float, true>(p) : function<float, false>(p);        \
    case DType::kBFloat16:                                                          \
      return general ? function<BFloat16, true>(p) : function<BFloat16, false>(p);  \
    case DType::kFloat16:                                                           \
      return general ? function<Half, true>(p) : function<Half, false>(p);          \
  }                                                                                 \
  return "does not serve these logits' dtype";

}  // namespace

namespace FASTLM_CPU_TARGET {

const char* cross_entropy_fwd_cpu(const CrossEntropyFwdParams& p) { FASTLM_DISPATCH(fwd, p) }
const char* cross_entropy_bwd_cpu(const CrossEntropyBwdParams& p) { FASTLM_DISPATCH(bwd, p) }
const char* cross_entropy_sum_cpu(const CrossEntropySumParams& p) {
  return p.dtype == DType::kFloat64 ? sum_losses<double>(p) : sum_losses<float>(p);
}

}  // namespace FASTLM_CPU_TARGET

#if FASTLM_CPU_BASELINE
FASTLM_CPU_DISPATCH(cross_entropy_fwd_cpu, CrossEntropyFwdParams)
FASTLM_CPU_DISPATCH(cross_entropy_sum_cpu, CrossEntropySumParams)
FASTLM_CPU_DISPATCH(cross_entropy_bwd_cpu, CrossEntropyBwdParams)
#endif

}  // namespace fastlm
