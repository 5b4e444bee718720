// From dtypes at run time to types: the pairs of input and residual that CUDA kernels are compiled for.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/dtype.h"

namespace fastlm {

// function(T{}, R{}) for every pair: the residual is of the input's type, or fp32.
template <typename F>
void for_each_pair(const F& function) {
  function(float{}, float{});
  function(__nv_bfloat16{}, __nv_bfloat16{});
  function(__nv_bfloat16{}, float{});
  function(__half{}, __half{});
  function(__half{}, float{});
}

// function(T{}, R{}) for these dtypes.
template <typename F>
const char* dispatch_pair(DType t, DType r, const F& function) {
  if (t == DType::kFloat32 && r == DType::kFloat32) return function(float{}, float{});
  if (t == DType::kBFloat16 && r == DType::kBFloat16) return function(__nv_bfloat16{}, __nv_bfloat16{});
  if (t == DType::kBFloat16 && r == DType::kFloat32) return function(__nv_bfloat16{}, float{});
  if (t == DType::kFloat16 && r == DType::kFloat16) return function(__half{}, __half{});
  if (t == DType::kFloat16 && r == DType::kFloat32) return function(__half{}, float{});
  return "the dtypes of input and residual do not go together";
}

}  // namespace fastlm
