#include "common/cpu_target.h"

namespace fastlm {

bool cpu_target_runs(int target) {
#if defined(__x86_64__)  // what -march of each variant, in setup.py, lets the compiler use
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512cd") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (target == kAvx2) return avx2;
  if (target == kAvx512) return avx512;
  if (target == kAvx512Bf16) {
    return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  }
#endif
  return target == kBaseline;
}

}  // namespace fastlm
