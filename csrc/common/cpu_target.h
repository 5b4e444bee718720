// The variants of the CPU kernels. setup.py compiles every *_cpu.cpp once per instruction set, with FASTLM_CPU_TARGET
// set to its name; at run time a launcher takes the best variant that the processor has, or the one it is asked for.
#pragma once

namespace fastlm {

enum CpuTarget : int { kBaseline, kAvx2, kAvx512, kAvx512Bf16, kAmx, kCpuTargets };

constexpr const char* kCpuTargetNames[] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx"};

// Whether the variant was compiled and this processor (and operating system) can run it.
bool cpu_target_runs(int target);

// Declares a launcher, one function per variant, and the function that chooses among them: `target` is one of the
// above.
#define FASTLM_CPU_LAUNCHER(name, Params) \
  namespace baseline {                    \
  const char* name(const Params& params); \
  }                                       \
  namespace avx2 {                        \
  const char* name(const Params& params); \
  }                                       \
  namespace avx512 {                      \
  const char* name(const Params& params); \
  }                                       \
  namespace avx512_bf16 {                 \
  const char* name(const Params& params); \
  }                                       \
  namespace amx {                         \
  const char* name(const Params& params); \
  }                                       \
  const char* name(const Params& params, int target);

// 1 in the baseline variant's translation unit, which is where that function is defined.
#define FASTLM_IS_baseline 1
#define FASTLM_JOIN(a, b) a##b
#define FASTLM_IS(target) FASTLM_JOIN(FASTLM_IS_, target)
#define FASTLM_CPU_BASELINE FASTLM_IS(FASTLM_CPU_TARGET)

#if defined(__x86_64__)
#define FASTLM_CPU_DISPATCH(name, Params)                                                              \
  const char* name(const Params& params, int target) {                                                 \
    if (!cpu_target_runs(target)) return "this processor does not have the instruction set asked for"; \
    return (target == kAmx          ? amx::name                                                        \
            : target == kAvx512Bf16 ? avx512_bf16::name                                                \
            : target == kAvx512     ? avx512::name                                                     \
            : target == kAvx2       ? avx2::name                                                       \
                                    : baseline::name)(params);                                         \
  }
#else
#define FASTLM_CPU_DISPATCH(name, Params)                                                              \
  const char* name(const Params& params, int target) {                                                 \
    if (!cpu_target_runs(target)) return "this processor does not have the instruction set asked for"; \
    return baseline::name(params);                                                                     \
  }
#endif

}  // namespace fastlm
