// Launcher of the linear layer for few rows, on the CPU.
//
//   output = (input weight^T) * weight_scale + bias
//
// T is the dtype of input, bias and output, W that of the weight: T, or int8 with a scale for each of its rows. A is
// fp32, or fp64 if T is. The launcher returns null, or what is wrong. There is at least one row, and a column of each.
#pragma once

#include <cstdint>
#include <tuple>

#include "common/cpu_target.h"
#include "common/dtype.h"
#include "common/rows.h"

namespace fastlm {

struct LinearFwdParams {
  const void* input;         // [rows, in_features] T
  const void* weight;        // [out_features, in_features] W
  const void* weight_scale;  // [out_features] A, or null: W is T
  const void* bias;          // [out_features] T, or null: 0
  void* output;              // [rows, out_features] T
  Rows rows;
  Four input_strides;
  int64_t in_features, out_features;
  int64_t weight_stride;  // elements from one row to the next
  DType dtype;

  using P = LinearFwdParams;
  static constexpr auto fields() {
    return std::make_tuple(&P::input, &P::weight, &P::weight_scale, &P::bias, &P::output, &P::rows, &P::input_strides,
                           &P::in_features, &P::out_features, &P::weight_stride, &P::dtype);
  }
};

FASTLM_CPU_LAUNCHER(linear_fwd_cpu, LinearFwdParams)

}  // namespace fastlm
