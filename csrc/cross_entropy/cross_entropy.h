// Launchers of softmax cross-entropy over rows of logits, for CUDA and for the CPU.
//
//   x     = softcap * tanh(logits / softcap)                       without a soft cap the logits
//   m     = max(x),  l = log(sum(exp(x - m))),  lse = m + l
//   q     = (1 - label_smoothing) * onehot(target) * weight[target] + label_smoothing / cols * weight
//           of probabilities ((1 - label_smoothing) * target + label_smoothing / cols) * weight
//   mass  = sum(q)
//   loss  = sum(q * (lse - x)) + z_loss * lse^2
//   grad  = (exp(x - lse) * (mass * scale + 2 * z_loss * lse * z_scale) - q * scale) * (1 - (x / softcap)^2)
//
// with scale = grad_loss / divisors[0] and z_scale = grad_loss / divisors[1]. Rows whose target is ignore_index have
// neither loss nor gradient, and their logits are not read.
//
// T is the dtype of the logits and their gradient, Q that of probabilities, W that of the class weights, A fp32, or
// fp64 if T is. A launcher returns null, or what is wrong. There is at least one row and one column.
//
// Source: Milakov and Gimelshein 2018 (arXiv 1805.02867) for the online softmax.
#pragma once

#include <cstdint>
#include <tuple>

#include "common/cpu_target.h"
#include "common/dtype.h"
#include "common/rows.h"

namespace fastlm {

constexpr const char* kTargetOutOfRange = "a target is out of range";
constexpr int64_t kMaxCols = (int64_t{1} << 31) - (1 << 16);  // of a row, so that a column and a step beyond fit an int

struct CrossEntropyFwdParams {
  void* logits;          // [rows, cols] T; given divisors the gradient for grad_loss 1 takes their place
  const void* target;    // [rows] int64, or [rows, cols] Q
  const void* weight;    // [cols] W, or null: 1
  const void* divisors;  // [2] A, or null: no gradient
  void* losses;          // [rows] A
  void* stats;           // [3, rows] A: m, l and mass
  Rows rows;
  Four logits_strides, target_strides;
  int64_t cols;
  int64_t stats_stride;  // from one kind of statistic to the next
  int64_t ignore_index;
  double label_smoothing, z_loss, softcap;
  bool probabilities;
  DType dtype, target_dtype, weight_dtype;

  using P = CrossEntropyFwdParams;
  static constexpr auto fields() {
    return std::make_tuple(&P::logits, &P::target, &P::weight, &P::divisors, &P::losses, &P::stats, &P::rows,
                           &P::logits_strides, &P::target_strides, &P::cols, &P::stats_stride, &P::ignore_index,
                           &P::label_smoothing, &P::z_loss, &P::softcap, &P::probabilities, &P::dtype, &P::target_dtype,
                           &P::weight_dtype);
  }
};

// The mean, or without divisors the sum, of the losses with their z part, whose mean counts every row that is not
// ignored, whatever its class's weight.
struct CrossEntropySumParams {
  const int64_t* target;  // [rows], or null: probabilities
  const void* weight;     // [cols] W, or null
  const void* losses;     // [rows] A, or null: only the divisors
  const void* stats;      // [3, rows] A, or null
  void* divisors;         // [2] A, to fill, or null: the sum of the weights of targets not ignored, and their number
  void* loss;             // [1] A, to fill, or null
  int64_t rows, stats_stride;
  int64_t cols;  // 0 without weight
  int64_t ignore_index;
  double z_loss;
  DType dtype, weight_dtype;  // the first of losses

  using P = CrossEntropySumParams;
  static constexpr auto fields() {
    return std::make_tuple(&P::target, &P::weight, &P::losses, &P::stats, &P::divisors, &P::loss, &P::rows,
                           &P::stats_stride, &P::cols, &P::ignore_index, &P::z_loss, &P::dtype, &P::weight_dtype);
  }
};

struct CrossEntropyBwdParams {
  const void* grad_loss;  // [rows] A, or [1] A
  const void* logits;     // [rows, cols] T
  const void* target;     // as in forward
  const void* weight;     // [cols] W, or null
  const void* divisors;   // [2] A, of which 0 counts as 1, or null: 1
  const void* stats;      // [3, rows] A, as forward left them
  void* grad;             // [rows, cols] T; may be the logits
  Rows rows;
  Four logits_strides, target_strides, grad_strides;
  int64_t cols;
  int64_t stats_stride;
  bool grad_per_row;
  int64_t ignore_index;
  double label_smoothing, z_loss, softcap;
  bool probabilities;
  DType dtype, target_dtype, weight_dtype;

  using P = CrossEntropyBwdParams;
  static constexpr auto fields() {
    return std::make_tuple(&P::grad_loss, &P::logits, &P::target, &P::weight, &P::divisors, &P::stats, &P::grad,
                           &P::rows, &P::logits_strides, &P::target_strides, &P::grad_strides, &P::cols,
                           &P::stats_stride, &P::grad_per_row, &P::ignore_index, &P::label_smoothing, &P::z_loss,
                           &P::softcap, &P::probabilities, &P::dtype, &P::target_dtype, &P::weight_dtype);
  }
};

const char* cross_entropy_fwd(const CrossEntropyFwdParams& params, int device, void* stream);
const char* cross_entropy_sum(const CrossEntropySumParams& params, int device, void* stream);
const char* cross_entropy_bwd(const CrossEntropyBwdParams& params, int device, void* stream);

FASTLM_CPU_LAUNCHER(cross_entropy_fwd_cpu, CrossEntropyFwdParams)
FASTLM_CPU_LAUNCHER(cross_entropy_sum_cpu, CrossEntropySumParams)
FASTLM_CPU_LAUNCHER(cross_entropy_bwd_cpu, CrossEntropyBwdParams)

}  // namespace fastlm
