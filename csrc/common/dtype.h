// Element types as launchers are told them; fastlm._C.DTYPES gives Python the same numbers.
#pragma once

#if defined(__CUDACC__)
#define FASTLM_HOST_DEVICE __host__ __device__
#define FASTLM_NO_UNROLL _Pragma("unroll 1")  // for loops that would fill registers and the instruction cache
#else
#define FASTLM_HOST_DEVICE
#define FASTLM_NO_UNROLL
#endif

namespace fastlm {

enum class DType : int { kFloat32, kBFloat16, kFloat16, kFloat64 };

constexpr const char* kDTypeNames[] = {"float32", "bfloat16", "float16", "float64"};

}  // namespace fastlm
