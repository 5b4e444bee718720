// Elements in memory and in registers: loads and stores of up to 16 bytes at a time, converted to and from fp32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/dtype.h"

namespace fastlm {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float(float x) {
  return x;
}
template <>
__device__ inline __nv_bfloat16 from_float(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline __half from_float(float x) {
  return __float2half_rn(x);
}

template <typename T>
constexpr const char* kTypeName = "fp32";
template <>
inline constexpr const char* kTypeName<__nv_bfloat16> = "bf16";
template <>
inline constexpr const char* kTypeName<__half> = "fp16";

constexpr int kMaxAccess = 16;  // bytes of one load or store

// N neighbours, as they lie in memory.
template <typename T, int N>
struct alignas(sizeof(T) * N < kMaxAccess ? sizeof(T) * N : kMaxAccess) Packed {
  T at[N];
};

// N neighbours from p, which is aligned to their size or to 16 bytes.
template <int N, typename T>
__device__ inline void load(const T* p, float (&x)[N]) {
  const Packed<T, N> packed = *reinterpret_cast<const Packed<T, N>*>(p);
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = to_float(packed.at[i]);
}

template <int N, typename T>
__device__ inline void store(T* p, const float (&x)[N]) {
  Packed<T, N> packed;
#pragma unroll
  for (int i = 0; i < N; ++i) packed.at[i] = from_float<T>(x[i]);
  *reinterpret_cast<Packed<T, N>*>(p) = packed;
}

// N neighbours of a parameter in whatever dtype it is; `missing` if there is none.
template <int N>
__device__ inline void load_parameter(const void* p, DType dtype, int64_t at, float missing, float (&x)[N]) {
  if (p == nullptr) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = missing;
  } else if (dtype == DType::kFloat32) {
    load<N>(static_cast<const float*>(p) + at, x);
  } else if (dtype == DType::kBFloat16) {
    load<N>(static_cast<const __nv_bfloat16*>(p) + at, x);
  } else {
    load<N>(static_cast<const __half*>(p) + at, x);
  }
}

// One element of a parameter's gradient.
__device__ inline void store_parameter(void* p, DType dtype, int64_t at, float x) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(p)[at] = x;
  } else if (dtype == DType::kBFloat16) {
    static_cast<__nv_bfloat16*>(p)[at] = from_float<__nv_bfloat16>(x);
  } else {
    static_cast<__half*>(p)[at] = from_float<__half>(x);
  }
}

// Whether rows of `cols` elements of T, the first at p and `strides` elements apart, can be accessed `width` elements
// at a time, in 16 bytes or fewer.
template <typename T, typename Strides>
bool is_aligned(const T* p, const Strides& strides, int64_t cols, int width) {
  const int64_t bytes = int64_t{sizeof(T)} * width < kMaxAccess ? int64_t{sizeof(T)} * width : kMaxAccess;
  bool aligned = cols % width == 0 && reinterpret_cast<uintptr_t>(p) % bytes == 0;
  for (const int64_t stride : strides.at) aligned = aligned && stride * int64_t{sizeof(T)} % bytes == 0;
  return p == nullptr || aligned;
}

}  // namespace fastlm
