#include "common/cpu_target.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastlm {

// Whether the processor has tiles and dot products of bf16 on them, and Linux lets this process use them: it does not
// keep the room for their contents before it is asked.
static bool has_amx() {
#if defined(FASTLM_TILES_IN_SOFTWARE)  // tests/proof/cpu.py
  return true;
#elif defined(__x86_64__) && defined(__linux__)
  constexpr unsigned kTiles = 1u << 24 | 1u << 23 | 1u << 22;  // AMX-TILE, AVX512-FP16, AMX-BF16 in EDX of leaf 7
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kTiles) == kTiles &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool cpu_target_runs(int target) {
#if defined(__x86_64__)  // what -march of each variant, in setup.py, lets the compiler use
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512cd") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (target == kAvx2) return avx2;
  if (target == kAvx512) return avx512;
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  if (target == kAvx512Bf16) return bf16;
  if (target == kAmx) {
    static const bool amx = bf16 && has_amx();
    return amx;
  }
#endif
  return target == kBaseline;
}

}  // namespace fastlm
