// What a step of generation needs besides the ops, on the CPU; definitions in step.h. There is little of it: one
// thread.
#include <cmath>

#include "common/cpu_rows.h"
#include "generation/step.h"

namespace fastlm {
namespace {

template <Activation kind>
Vec<float> activate(Vec<float> x) {
  if constexpr (kind == kGeluTanh) {
    return 0.5f * x * (1.0f + tanh(0.7978845608f * (x + 0.044715f * x * x * x)));
  } else if constexpr (kind == kGelu) {
    for (int i = 0; i < kLanes<float>; ++i) x[i] = 0.5f * x[i] * (1.0f + std::erf(x[i] * 0.70710678f));
    return x;
  } else if constexpr (kind == kRelu) {
    return x < 0 ? Vec<float>{} : x;
  } else {
    return x / (1.0f + exp(-x));
  }
}

template <typename T, Activation kind>
const char* activate_all(const ActivationParams& p) {
  T* const x = static_cast<T*>(p.x);
  for_columns<float>(p.count,
                     [&](int64_t c, int64_t count, int) { store(x + c, activate<kind>(load(x + c, count)), count); });
  return nullptr;
}

template <typename T>
const char* activation(const ActivationParams& p) {
  switch (p.activation) {
    case kGeluTanh:
      return activate_all<T, kGeluTanh>(p);
    case kGelu:
      return activate_all<T, kGelu>(p);
    case kRelu:
      return activate_all<T, kRelu>(p);
    case kSilu:
      return activate_all<T, kSilu>(p);
  }
  return "does not know this activation";
}

template <typename T>
const char* cache_write(const CacheWriteParams& p) {
  const int64_t row_of_qkv = 3 * p.heads * p.head_dim;
  for (int64_t row = 0; row < p.rows; ++row) {
    const int64_t place = p.places[row];
    if (place < 0 || place >= p.size) return "a place is beyond the cache";
    for (int64_t head = 0; head < p.heads; ++head) {
      const T* const from = static_cast<const T*>(p.qkv) + row * row_of_qkv + (p.heads + head) * p.head_dim;
      const int64_t to = row / p.group * p.batch_stride + head * p.head_stride + place * p.head_dim;
      memcpy(static_cast<T*>(p.keys) + to, from, p.head_dim * sizeof(T));
      memcpy(static_cast<T*>(p.values) + to, from + p.heads * p.head_dim, p.head_dim * sizeof(T));
    }
  }
  return nullptr;
}

#define FASTLM_DISPATCH(function, p)             \
  switch (p.dtype) {                             \
    case DType::kFloat32:                        \
      return function<float>(p);                 \
    case DType::kBFloat16:                       \
      return function<BFloat16>(p);              \
    case DType::kFloat16:                        \
      return function<Half>(p);                  \
    default:                                     \
      return "serves float32 and 16-bit dtypes"; \
  }

}  // namespace

namespace FASTLM_CPU_TARGET {

const char* cache_write_cpu(const CacheWriteParams& p) { FASTLM_DISPATCH(cache_write, p) }
const char* activation_cpu(const ActivationParams& p) { FASTLM_DISPATCH(activation, p) }

}  // namespace FASTLM_CPU_TARGET

#if FASTLM_CPU_BASELINE
FASTLM_CPU_DISPATCH(cache_write_cpu, CacheWriteParams)
FASTLM_CPU_DISPATCH(activation_cpu, ActivationParams)
#endif

}  // namespace fastlm
