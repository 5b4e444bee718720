// The device, on a CPU: what common/device.cuh and CUDA's own built-ins are to a kernel that g++ compiles. Threads are
// fibers (scheduler.cpp); what a warp or a block does together waits here until all who take part have come.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

#define __launch_bounds__(...)

// Of functions between a kernel and the emulator, so that the kernel's line is the one that calls.
#define FASTLM_INLINE __attribute__((always_inline)) inline

// The place in the source of a call, as the last two arguments of what calls the emulator.
#define FASTLM_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace fastlm {

constexpr bool kAtLeastSm80 = true;

namespace emulator {

// A kernel with its arguments. `call` calls it, in one thread.
struct Launch {
  const void* kernel;
  void (*call)(const void* kernel, const void* params);
  const void* params;
  size_t params_bytes;
  dim3 grid, block;
  size_t shared_bytes;
};

void run(const Launch& launch);  // what goes wrong is cudaGetLastError's

template <typename Params>
FASTLM_INLINE Launch launch_of(void (*kernel)(Params), const Params* params, dim3 grid, dim3 block,
                               size_t shared_bytes) {
  const auto call = [](const void* k, const void* p) {
    reinterpret_cast<void (*)(Params)>(const_cast<void*>(k))(*static_cast<const Params*>(p));
  };
  return {reinterpret_cast<const void*>(kernel), call, params, sizeof(Params), grid, block, shared_bytes};
}

// Lets a kernel be run by its name; `kernel` lacks parameters, grid and block.
void add_runnable(const char* name, const Launch& kernel);

template <typename Params>
FASTLM_INLINE void make_runnable(const char* name, void (*kernel)(Params)) {
  add_runnable(name, launch_of<Params>(kernel, nullptr, 0, 0, 0));
}

// Storage of the current block, of which each block has its own, poisoned.
void* static_shared(const void* identity, size_t bytes, size_t alignment);
void* dynamic_shared();

// Waits until all threads of `mask` in this warp have come to the same call, then lets `resolve` work on the operands
// of all of them, indexed by lane (null for those that do not take part).
using Resolve = void (*)(void* const* operands);
void collective(const char* what, uint32_t mask, void* operands, Resolve resolve, const char* file, int line);
uint32_t running_lanes();  // of this warp, those that have not exited

// A barrier of `threads` threads of the block (0: all), which `wait` or only arrive.
void barrier(const char* what, int barrier, int threads, bool wait, const char* file, int line);

void copy_async(void* shared, const void* global, int size, int bytes, const char* file, int line);
void copy_commit();
void copy_wait(int pending);

// The two halves of an atomic operation on p: nothing comes between.
void atomic_load(const void* p, void* old, size_t bytes, const char* file, int line);
void atomic_store(void* p, const void* updated, size_t bytes);

[[noreturn]] void fail(const char* message, const char* file, int line);

struct Shuffle {
  enum Mode { kIndex, kUp, kDown, kXor } mode;
  int argument, width;
  uint64_t value, result;
};
void shuffle(const char* what, uint32_t mask, Shuffle& operands, const char* file, int line);

template <typename T>
FASTLM_INLINE T shuffle(const char* what, uint32_t mask, T x, Shuffle::Mode mode, int argument, int width,
                        const char* file, int line) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>, "shuffles move 8 bytes at most");
  Shuffle operands = {mode, argument, width, 0, 0};
  std::memcpy(&operands.value, &x, sizeof(T));
  shuffle(what, mask, operands, file, line);
  std::memcpy(&x, &operands.result, sizeof(T));
  return x;
}

// For each lane of the mask, the lanes that gave the same value.
uint32_t match(const char* what, uint32_t mask, uint64_t value, const char* file, int line);

struct Ldmatrix {
  const void* row;
  uint32_t* d;
  int count;
  bool transpose;
  const char* file;
  int line;
  uintptr_t place = 0;  // of the call, as an address
};
void ldmatrix(Ldmatrix operands);

enum class MmaType { kBFloat16, kFloat16, kTf32 };
struct Mma {
  MmaType type;
  float* d;
  const uint32_t *a, *b;
};
void mma(const char* what, Mma operands, const char* file, int line);

template <typename To, typename From>
FASTLM_INLINE To bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "bits of one size");
  To y;
  std::memcpy(static_cast<void*>(&y), &x, sizeof(To));
  return y;
}

template <typename T, typename Update>
FASTLM_INLINE T atomic_update(T* p, const Update& update, const char* file, int line) {
  T old;
  atomic_load(p, &old, sizeof(T), file, line);
  const T updated = update(old);
  atomic_store(p, &updated, sizeof(T));
  return old;
}

}  // namespace emulator

#define FASTLM_SHARED(type, name, extent)     \
  static const char name##_identity = 0;      \
  typedef type name##_storage extent;         \
  auto& name = *static_cast<name##_storage*>( \
      fastlm::emulator::static_shared(&name##_identity, sizeof(name##_storage), alignof(name##_storage)))

#define FASTLM_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(fastlm::emulator::dynamic_shared())

template <typename Params>
FASTLM_INLINE void start(void (*kernel)(Params), dim3 grid, dim3 block, const Params& params, size_t shared_bytes,
                         void*) {
  emulator::run(emulator::launch_of(kernel, &params, grid, block, shared_bytes));
}

template <int kBytes>
FASTLM_INLINE void cp_async(void* shared, const void* global, int bytes = kBytes, FASTLM_PLACE) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp_async: 4, 8 or 16 bytes");
  emulator::copy_async(shared, global, kBytes, bytes, file, line);
}

FASTLM_INLINE void cp_async_commit() { emulator::copy_commit(); }

template <int kPending>
FASTLM_INLINE void cp_async_wait() {
  emulator::copy_wait(kPending);
}

FASTLM_INLINE void barrier_sync(int barrier, int threads, FASTLM_PLACE) {
  emulator::barrier("barrier_sync", barrier, threads, true, file, line);
}

FASTLM_INLINE void barrier_arrive(int barrier, int threads, FASTLM_PLACE) {
  emulator::barrier("barrier_arrive", barrier, threads, false, file, line);
}

template <int N>
FASTLM_INLINE void ldmatrix(uint32_t (&d)[N], const void* row, FASTLM_PLACE) {
  static_assert(N == 1 || N == 2 || N == 4, "ldmatrix: 1, 2 or 4 matrices");
  emulator::ldmatrix({row, d, N, false, file, line});
}

template <int N>
FASTLM_INLINE void ldmatrix_trans(uint32_t (&d)[N], const void* row, FASTLM_PLACE) {
  static_assert(N == 1 || N == 2 || N == 4, "ldmatrix_trans: 1, 2 or 4 matrices");
  emulator::ldmatrix({row, d, N, true, file, line});
}

template <typename T>
FASTLM_INLINE void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], FASTLM_PLACE) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>, "mma_16816: bf16 or fp16");
  constexpr auto type = std::is_same_v<T, __half> ? emulator::MmaType::kFloat16 : emulator::MmaType::kBFloat16;
  emulator::mma("mma_16816", {type, d, a, b}, file, line);
}

FASTLM_INLINE void mma_1688_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], FASTLM_PLACE) {
  emulator::mma("mma_1688_tf32", {emulator::MmaType::kTf32, d, a, b}, file, line);
}

// ftz: subnormal numbers are zeros of their sign, going in and coming out.
FASTLM_INLINE float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

FASTLM_INLINE void device_assert(bool holds, const char* message, FASTLM_PLACE) {
  if (!holds) emulator::fail(message, file, line);
}

FASTLM_INLINE int not_before(int x) { return x; }

FASTLM_INLINE float exp2_approx(float x) { return flushed(std::exp2(flushed(x))); }

}  // namespace fastlm

// CUDA's built-ins, by their own names ------------------------------------------------------------------------------

FASTLM_INLINE void __syncthreads(FASTLM_PLACE) { fastlm::emulator::barrier("__syncthreads", 0, 0, true, file, line); }

FASTLM_INLINE void __syncwarp(uint32_t mask = 0xFFFFFFFFu, FASTLM_PLACE) {
  fastlm::emulator::collective("__syncwarp", mask, nullptr, nullptr, file, line);
}

template <typename T>
FASTLM_INLINE T __shfl_sync(uint32_t mask, T x, int lane, int width = warpSize, FASTLM_PLACE) {
  using namespace fastlm::emulator;
  return shuffle("__shfl_sync", mask, x, Shuffle::kIndex, lane, width, file, line);
}

template <typename T>
FASTLM_INLINE T __shfl_up_sync(uint32_t mask, T x, unsigned delta, int width = warpSize, FASTLM_PLACE) {
  using namespace fastlm::emulator;
  return shuffle("__shfl_up_sync", mask, x, Shuffle::kUp, static_cast<int>(delta), width, file, line);
}

template <typename T>
FASTLM_INLINE T __shfl_down_sync(uint32_t mask, T x, unsigned delta, int width = warpSize, FASTLM_PLACE) {
  using namespace fastlm::emulator;
  return shuffle("__shfl_down_sync", mask, x, Shuffle::kDown, static_cast<int>(delta), width, file, line);
}

template <typename T>
FASTLM_INLINE T __shfl_xor_sync(uint32_t mask, T x, int lanes, int width = warpSize, FASTLM_PLACE) {
  using namespace fastlm::emulator;
  return shuffle("__shfl_xor_sync", mask, x, Shuffle::kXor, lanes, width, file, line);
}

// Those that gave the same truth as this lane; all of them if there is no other.
FASTLM_INLINE uint32_t __ballot_sync(uint32_t mask, int predicate, FASTLM_PLACE) {
  const uint32_t same = fastlm::emulator::match("__ballot_sync", mask, predicate != 0, file, line);
  return predicate != 0 ? same : mask & fastlm::emulator::running_lanes() & ~same;
}

FASTLM_INLINE int __any_sync(uint32_t mask, int predicate, FASTLM_PLACE) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}

FASTLM_INLINE int __all_sync(uint32_t mask, int predicate, FASTLM_PLACE) {
  return __ballot_sync(mask, predicate == 0, file, line) == 0;
}

template <typename T>
FASTLM_INLINE uint32_t __match_any_sync(uint32_t mask, T value, FASTLM_PLACE) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return fastlm::emulator::match("__match_any_sync", mask, bits, file, line);
}

template <typename T>
FASTLM_INLINE T atomicAdd(T* p, std::common_type_t<T> x, FASTLM_PLACE) {
  const auto add = [&](T old) {
    if constexpr (!std::is_integral_v<T>) return static_cast<T>(old + x);
    using Unsigned = std::make_unsigned_t<std::conditional_t<std::is_integral_v<T>, T, int>>;  // which wrap around
    return static_cast<T>(static_cast<Unsigned>(old) + static_cast<Unsigned>(x));
  };
  return fastlm::emulator::atomic_update(p, add, file, line);
}

template <typename T>
FASTLM_INLINE T atomicMax(T* p, std::common_type_t<T> x, FASTLM_PLACE) {
  return fastlm::emulator::atomic_update(p, [&](T old) { return std::max(old, x); }, file, line);
}

template <typename T>
FASTLM_INLINE T atomicMin(T* p, std::common_type_t<T> x, FASTLM_PLACE) {
  return fastlm::emulator::atomic_update(p, [&](T old) { return std::min(old, x); }, file, line);
}

template <typename T>
FASTLM_INLINE T atomicExch(T* p, std::common_type_t<T> x, FASTLM_PLACE) {
  return fastlm::emulator::atomic_update(p, [&](T) { return x; }, file, line);
}

template <typename T>
FASTLM_INLINE T atomicCAS(T* p, std::common_type_t<T> expected, std::common_type_t<T> x, FASTLM_PLACE) {
  return fastlm::emulator::atomic_update(p, [&](T old) { return old == expected ? x : old; }, file, line);
}

FASTLM_INLINE void __threadfence() {}
FASTLM_INLINE void __threadfence_block() {}

[[noreturn]] inline void __trap(FASTLM_PLACE) { fastlm::emulator::fail("__trap", file, line); }

template <typename T>
FASTLM_INLINE T __ldg(const T* p) {
  return *p;
}
template <typename T>
FASTLM_INLINE T __ldcg(const T* p) {
  return *p;
}
template <typename T>
FASTLM_INLINE T __ldcs(const T* p) {
  return *p;
}
template <typename T>
FASTLM_INLINE void __stcs(T* p, T x) {
  *p = x;
}
template <typename T>
FASTLM_INLINE void __stcg(T* p, T x) {
  *p = x;
}

FASTLM_INLINE float __fmul_rn(float x, float y) { return x * y; }
FASTLM_INLINE float __fadd_rn(float x, float y) { return x + y; }
FASTLM_INLINE float __fsub_rn(float x, float y) { return x - y; }
FASTLM_INLINE float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
FASTLM_INLINE float __fdiv_rn(float x, float y) { return x / y; }
FASTLM_INLINE float __frcp_rn(float x) { return 1.0f / x; }
FASTLM_INLINE float __fsqrt_rn(float x) { return std::sqrt(x); }
FASTLM_INLINE float __fdividef(float x, float y) {  // by more than 2^126 gives 0, but for infinities
  return std::fabs(y) > 0x1p126f && std::isfinite(y) ? x * 0.0f : x / y;
}
FASTLM_INLINE float __expf(float x) { return fastlm::exp2_approx(x * 1.4426950408889634f); }
FASTLM_INLINE float __exp10f(float x) { return fastlm::exp2_approx(x * 3.321928094887362f); }
FASTLM_INLINE float __log2f(float x) { return std::log2(fastlm::flushed(x)); }
FASTLM_INLINE float __logf(float x) { return __log2f(x) * 0.6931471805599453f; }
FASTLM_INLINE float __saturatef(float x) { return x > 0.0f ? std::min(x, 1.0f) : 0.0f; }
FASTLM_INLINE float rsqrtf(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }

FASTLM_INLINE int __float_as_int(float x) { return fastlm::emulator::bits<int>(x); }
FASTLM_INLINE unsigned __float_as_uint(float x) { return fastlm::emulator::bits<unsigned>(x); }
FASTLM_INLINE float __int_as_float(int x) { return fastlm::emulator::bits<float>(x); }
FASTLM_INLINE float __uint_as_float(unsigned x) { return fastlm::emulator::bits<float>(x); }
FASTLM_INLINE int __popc(unsigned x) { return __builtin_popcount(x); }
FASTLM_INLINE int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
FASTLM_INLINE int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
FASTLM_INLINE int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
FASTLM_INLINE int __ffs(int x) { return __builtin_ffs(x); }
FASTLM_INLINE int __ffsll(long long x) { return __builtin_ffsll(x); }
FASTLM_INLINE unsigned __umulhi(unsigned x, unsigned y) { return static_cast<unsigned>(uint64_t{x} * y >> 32); }
FASTLM_INLINE unsigned __brev(unsigned x) {
  unsigned y = 0;
  for (int bit = 0; bit < 32; ++bit) y |= (x >> bit & 1u) << (31 - bit);
  return y;
}
// Four bytes of the eight of y:x, chosen by the lower three bits of each nibble; its fourth bit spreads the byte's
// sign.
FASTLM_INLINE unsigned __byte_perm(unsigned x, unsigned y, unsigned select) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  unsigned result = 0;
  for (int n = 0; n < 4; ++n) {
    const unsigned nibble = select >> 4 * n & 15u;
    unsigned byte = static_cast<unsigned>(bytes >> 8 * (nibble & 7u)) & 255u;
    if (nibble & 8u) byte = byte & 128u ? 255u : 0u;
    result |= byte << 8 * n;
  }
  return result;
}

// Of CUDA's overloads, those between one type; mixed ones are not to be had here.
template <typename T>
FASTLM_INLINE std::enable_if_t<std::is_arithmetic_v<T>, T> min(T x, T y) {
  if constexpr (std::is_floating_point_v<T>) return std::fmin(x, y);
  return y < x ? y : x;
}
template <typename T>
FASTLM_INLINE std::enable_if_t<std::is_arithmetic_v<T>, T> max(T x, T y) {
  if constexpr (std::is_floating_point_v<T>) return std::fmax(x, y);
  return x < y ? y : x;
}
