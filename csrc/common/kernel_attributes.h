// Registry of CUDA kernels and what the compiler made of each: registers, shared memory, spills, blocks per
// multiprocessor. A launcher's file registers its kernels when the module is loaded:
//
//   const bool registered = (register_kernel("layer_norm_fwd<bf16>", layer_norm_fwd_kernel<__nv_bfloat16>, 256), true);
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

// One kernel instantiation, with the largest block its launcher starts.
void register_kernel(const std::string& name, const void* kernel, int threads_per_block, size_t dynamic_shared_bytes);

template <typename Params>
void register_kernel(const std::string& name, void (*kernel)(Params), int threads_per_block,
                     size_t dynamic_shared_bytes = 0) {
  register_kernel(name, reinterpret_cast<const void*>(kernel), threads_per_block, dynamic_shared_bytes);
}

// All registered kernels, as the current device runs them. Without a driver or a device only `status` is filled in.
std::vector<KernelAttributes> kernel_attributes();

}  // namespace fastlm
