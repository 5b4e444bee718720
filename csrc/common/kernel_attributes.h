// Registry of CUDA kernels and what the compiler made of each: registers, shared memory, spills, blocks per
// multiprocessor. A launcher's file registers its kernels at namespace scope:
//
//   static const fastlm::KernelRegistration registration(
//       "layer_norm_fwd<bf16>", reinterpret_cast<const void*>(&layer_norm_fwd_kernel<bf16>), kThreads, kSharedBytes);
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace fastlm {

struct KernelAttributes {
  std::string name;
  std::string status;  // empty, or why the numbers below are missing (no driver, no device, no code for this device)
  int threads_per_block;
  size_t dynamic_shared_bytes;
  int registers;               // per thread
  size_t static_shared_bytes;  // per block
  size_t local_bytes;          // per thread: spilled registers and arrays that are not in registers
  int max_threads_per_block;   // that the registers allow
  int binary_version;          // architecture of the machine code chosen for the current device: 80 for sm_80
  int ptx_version;             // of the PTX it was compiled from
  int blocks_per_multiprocessor;
};

// One kernel instantiation, with the largest block its launcher starts; objects of this type have static storage.
struct KernelRegistration {
  KernelRegistration(const char* name, const void* kernel, int threads_per_block, size_t dynamic_shared_bytes);
};

// All registered kernels, as the current device runs them. Without a driver or a device only `status` is filled in.
std::vector<KernelAttributes> kernel_attributes();

}  // namespace fastlm
