// Launchers of layer norm and RMS norm, alone or after adding to a residual stream, for CUDA and for the CPU.
//
//   sum    = residual + dropout(input)        in fp32, rounded once to the residual's dtype; without residual, the
//   input x_hat  = (sum - mean) * rstd              rstd = 1 / sqrt(mean((sum - mean)^2) + eps); RMS norm takes the
//   mean as 0 output = x_hat * weight + bias
//
//   g      = grad_output * weight
//   grad   = rstd * (g - mean(g) - x_hat * mean(g * x_hat)) + grad_new_residual
//   grad_residual = grad,  grad_input = dropout(grad),  grad_weight = sum(grad_output * x_hat),  grad_bias =
//   sum(grad_output)
//
// T is the dtype of input and output, R that of the residual (T without one), W that of weight and bias. A launcher
// returns null, or what is wrong. There is at least one row and one column.
//
// Source: Ba, Kiros and Hinton 2016 (arXiv 1607.06450); Zhang and Sennrich 2019 (arXiv 1910.07467).
#pragma once

#include <cstdint>
#include <tuple>

#include "common/cpu_target.h"
#include "common/dtype.h"
#include "common/rows.h"

namespace fastlm {

struct LayerNormFwdParams {
  const void* input;         // [rows, cols] T
  const void* residual;      // [rows, cols] R, or null
  const void* weight;        // [cols] W, or null
  const void* bias;          // [cols] W, or null
  const int64_t* rng_state;  // [2] seed and offset, or null: no dropout
  void* output;              // [rows, cols] T, contiguous
  void* new_residual;        // [rows, cols] R, contiguous; null without residual
  void* stats;               // [2, rows] mean and rstd, [1, rows] rstd for RMS norm; fp32, fp64 if T is
  Rows rows;
  Four input_strides, residual_strides;
  int64_t cols;
  double eps, dropout_p;
  bool rms;
  DType dtype, residual_dtype, parameter_dtype;

  using P = LayerNormFwdParams;
  static constexpr auto fields() {
    return std::make_tuple(&P::input, &P::residual, &P::weight, &P::bias, &P::rng_state, &P::output, &P::new_residual,
                           &P::stats, &P::rows, &P::input_strides, &P::residual_strides, &P::cols, &P::eps,
                           &P::dropout_p, &P::rms, &P::dtype, &P::residual_dtype, &P::parameter_dtype);
  }
};

struct LayerNormBwdParams {
  const void* grad_output;        // [rows, cols] T, or null
  const void* grad_new_residual;  // [rows, cols] R, or null
  const void* normalized;         // [rows, cols] R: what was normalised, the input or new_residual
  const void* weight;             // [cols] W, or null
  const void* stats;              // as forward left it
  const int64_t* rng_state;       // [2], or null
  void* grad_input;               // [rows, cols] T, contiguous, or null: not wanted, or the same as grad_residual
  void* grad_residual;            // [rows, cols] R, contiguous, or null
  void* grad_weight;              // [cols] W, or null
  void* grad_bias;                // [cols] W, or null
  void* partials;                 // [2, partial_rows, cols] fp32 (fp64 if T is), to work in: of grad_weight, grad_bias
  Rows rows;
  Four grad_output_strides, grad_new_residual_strides, normalized_strides;
  int64_t cols;
  double dropout_p;
  bool rms;
  DType dtype, residual_dtype, parameter_dtype;
  int64_t partial_rows;  // at most rows; a function of the shape alone, so that the sums are the same on every machine

  using P = LayerNormBwdParams;
  static constexpr auto fields() {
    return std::make_tuple(&P::grad_output, &P::grad_new_residual, &P::normalized, &P::weight, &P::stats, &P::rng_state,
                           &P::grad_input, &P::grad_residual, &P::grad_weight, &P::grad_bias, &P::partials, &P::rows,
                           &P::grad_output_strides, &P::grad_new_residual_strides, &P::normalized_strides, &P::cols,
                           &P::dropout_p, &P::rms, &P::dtype, &P::residual_dtype, &P::parameter_dtype,
                           &P::partial_rows);
  }
};

const char* layer_norm_fwd(const LayerNormFwdParams& params, int device, void* stream);
const char* layer_norm_bwd(const LayerNormBwdParams& params, int device, void* stream);

FASTLM_CPU_LAUNCHER(layer_norm_fwd_cpu, LayerNormFwdParams)
FASTLM_CPU_LAUNCHER(layer_norm_bwd_cpu, LayerNormBwdParams)

}  // namespace fastlm
