// Kernels that check the checkers: compiled for the emulator, which runs them by name, and by nvcc, for the PTX
// executor.
//
//   PROOF_KERNEL(copy) { args.tensor<float>(1)[threadIdx.x] = args.tensor<float>(0)[threadIdx.x]; }
#pragma once

#include <cstdint>

#include "common/device.cuh"
#include "common/kernel_attributes.h"

namespace fastlm {
namespace proof {

// What every such kernel takes: addresses of tensors, and numbers.
struct Args {
  void* tensors[8];
  int64_t numbers[8];

  template <typename T>
  __device__ T* tensor(int n) const {
    return static_cast<T*>(tensors[n]);
  }
};

}  // namespace proof
}  // namespace fastlm

#ifdef __CUDACC__
#define PROOF_KERNEL(name) __global__ void name(const __grid_constant__ fastlm::proof::Args args)
#else
#define PROOF_KERNEL(name)                                                                  \
  __global__ void name(const __grid_constant__ fastlm::proof::Args args);                   \
  static const bool name##_registered = (fastlm::register_kernel(#name, name, 1024), true); \
  static const bool name##_runnable = (fastlm::emulator::make_runnable(#name, name), true); \
  __global__ void name([[maybe_unused]] const __grid_constant__ fastlm::proof::Args args)
#endif
