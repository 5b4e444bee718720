// Asks the CUDA runtime about every registered kernel; see kernel_attributes.h. No kernel is launched.
#include "common/kernel_attributes.h"

#include <cuda_runtime.h>

namespace fastlm {
namespace {

struct Kernel {
  std::string name;
  const void* function;
  int threads_per_block;
  size_t dynamic_shared_bytes;
};

// Inside a function, so that it exists before the first registration whatever the order of static initialisation.
std::vector<Kernel>& registry() {
  static std::vector<Kernel> kernels;
  return kernels;
}

cudaError_t query(const Kernel& kernel, KernelAttributes& result) {
  cudaFuncAttributes attributes;
  cudaError_t error = cudaFuncGetAttributes(&attributes, kernel.function);
  if (error != cudaSuccess) return error;
  result.registers = attributes.numRegs;
  result.static_shared_bytes = attributes.sharedSizeBytes;
  result.local_bytes = attributes.localSizeBytes;
  result.max_threads_per_block = attributes.maxThreadsPerBlock;
  result.binary_version = attributes.binaryVersion;
  result.ptx_version = attributes.ptxVersion;
  // Past 48 KiB the kernel must be told before occupancy is asked for, else the answer is 0 blocks.
  error = cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(kernel.dynamic_shared_bytes));
  if (error != cudaSuccess) return error;
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(&result.blocks_per_multiprocessor, kernel.function,
                                                       kernel.threads_per_block, kernel.dynamic_shared_bytes);
}

}  // namespace

void register_kernel(const std::string& name, const void* kernel, int threads_per_block, size_t dynamic_shared_bytes) {
  registry().push_back({name, kernel, threads_per_block, dynamic_shared_bytes});
}

std::vector<KernelAttributes> kernel_attributes() {
  std::vector<KernelAttributes> results;
  for (const Kernel& kernel : registry()) {
    KernelAttributes result{};
    result.name = kernel.name;
    result.threads_per_block = kernel.threads_per_block;
    result.dynamic_shared_bytes = kernel.dynamic_shared_bytes;
    const cudaError_t error = query(kernel, result);
    if (error != cudaSuccess) {
      result.status = cudaGetErrorString(error);
      cudaGetLastError();  // ours alone: the next caller of the runtime must not find it
    }
    results.push_back(result);
  }
  return results;
}

}  // namespace fastlm
