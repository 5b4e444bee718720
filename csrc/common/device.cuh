// What kernels need of the device, in one place, and the only file with instructions of PTX. Without nvcc the same
// functions come from an emulator, which runs a kernel's threads one after another on a CPU, so that tests can.
//
// Fragments: a warp holds a matrix in registers, lane l = 4 * group + t (PTX ISA, "Matrix Fragments for mma").
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#ifndef __CUDACC__
#include "emulator.h"
#else

namespace fastlm {

// Whether this is compiled for compute capability 8.0 or newer, which has what is asynchronous here and mma_16816.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kAtLeastSm80 = false;
#else
constexpr bool kAtLeastSm80 = true;
#endif

// Shared memory of a block, of a size known at compile time: FASTLM_SHARED(float, tile, [8][32]).
#define FASTLM_SHARED(type, name, extent) __shared__ type name extent

// Shared memory of the size that the launcher asked for, as a pointer; one for a kernel, aligned to 128 bytes.
#define FASTLM_DYNAMIC_SHARED(type, name)                      \
  extern __shared__ __align__(128) unsigned char name##_all[]; \
  type* const name = reinterpret_cast<type*>(name##_all)

template <typename Params>
void start(void (*kernel)(Params), dim3 grid, dim3 block, const Params& params, size_t shared_bytes, void* stream) {
  void* arguments[] = {const_cast<Params*>(&params)};
  cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, arguments, shared_bytes,
                   static_cast<cudaStream_t>(stream));
}

__device__ inline unsigned shared_address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }

// Copies kBytes from global to shared memory while the thread goes on; both aligned to kBytes. Of the source, `bytes`
// are read, and zeros follow.
template <int kBytes>
__device__ inline void cp_async(void* shared, const void* global, int bytes = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp_async: 4, 8 or 16 bytes");
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global),
                 "n"(kBytes), "r"(bytes)
                 : "memory");
  }
}

// Ends a group of this thread's copies.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's last groups are under way. Other threads see the copies after a
// barrier.
template <int kPending>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Barriers of some of a block's warps: `threads` of them, a multiple of 32; 0 is that of __syncthreads.
__device__ inline void barrier_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// The same without waiting.
__device__ inline void barrier_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// N = 1, 2 or 4 matrices of 8 x 8 16-bit elements from shared memory: lane 8 * m + r has the address of row r of matrix
// m, aligned to 16 bytes. Register m holds elements (group, 2 * t) and (group, 2 * t + 1) of matrix m.
template <int N>
__device__ inline void ldmatrix(uint32_t (&d)[N], const void* row) {
  static_assert(N == 1 || N == 2 || N == 4, "ldmatrix: 1, 2 or 4 matrices");
  const unsigned p = shared_address(row);
  if constexpr (N == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(d[0]) : "r"(p) : "memory");
  } else if constexpr (N == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(d[0]), "=r"(d[1])
                 : "r"(p)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(p)
                 : "memory");
  }
}

// The same of the transposed matrices: elements (2 * t, group) and (2 * t + 1, group).
template <int N>
__device__ inline void ldmatrix_trans(uint32_t (&d)[N], const void* row) {
  static_assert(N == 1 || N == 2 || N == 4, "ldmatrix_trans: 1, 2 or 4 matrices");
  const unsigned p = shared_address(row);
  if constexpr (N == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(d[0]) : "r"(p) : "memory");
  } else if constexpr (N == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(d[0]), "=r"(d[1])
                 : "r"(p)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(p)
                 : "memory");
  }
}

// d += a b in fp32, for a of 16 x 16 and b of 16 x 8 elements of T, two to a register.
//   a[0..3]: rows group, group + 8, group, group + 8; columns 2 * t and 2 * t + 1, in a[2] and a[3] 8 more.
//   b[0..1]: rows 2 * t and 2 * t + 1, in b[1] 8 more; column group.
//   d[0..3]: rows group, group, group + 8, group + 8; columns 2 * t, 2 * t + 1, 2 * t, 2 * t + 1.
template <typename T>
__device__ void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ inline void mma_16816<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ inline void mma_16816<__half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same for a of 16 x 8 and b of 8 x 8 elements in tf32: fp32 of which the last 13 bits are not read.
//   a[0..3]: rows group, group + 8, group, group + 8; columns t, t, t + 4, t + 4.  b[0..1]: rows t, t + 4; column
//   group.
__device__ inline void mma_1688_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Unless `holds`, prints the message with block and thread, stops the kernel, and lets the host's next call fail; in
// every build, for this is assert() without NDEBUG.
__device__ inline void device_assert(bool holds, const char* message) {
#ifdef __CUDA_ARCH__  // the host's compiler does not know it under NDEBUG
  if (!holds) __assert_fail(message, "fastlm", 0, "kernel");
#endif
}

// x, of which the compiler knows nothing before: so that what follows from it is computed in a branch that is seldom
// taken and not, in registers that others need, ahead of the loop around it.
__device__ inline int not_before(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// 2^x, within 2 ulp.
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace fastlm

#endif

namespace fastlm {

// Bytes of a block's dynamic shared memory; those that a kernel asks for, on the GPU that has fewest (sm_86, 89, 120).
constexpr size_t kSharedWithoutOptIn = 48 << 10, kSharedWithOptIn = 99 << 10;

// Starts a kernel on a device's stream; null, or what is wrong.
template <typename Params>
const char* launch(void (*kernel)(Params), dim3 grid, dim3 block, const Params& params, int device, void* stream,
                   size_t shared_bytes = 0) {
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess && shared_bytes > kSharedWithoutOptIn) {
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes));
  }
  if (error == cudaSuccess) {
    start(kernel, grid, block, params, shared_bytes, stream);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fastlm
