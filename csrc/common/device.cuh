// What kernels need of the device, in one place: the only file whose contents differ between a GPU and anything else
// that is to run the same kernels.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fastlm {

// Shared memory of a block, of a size known at compile time.
#define FASTLM_SHARED(type, name, extent) __shared__ type name extent

// Starts a kernel on a device's stream; null, or what is wrong.
template <typename Params>
const char* launch(void (*kernel)(Params), dim3 grid, dim3 block, const Params& params, int device, void* stream) {
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(params);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fastlm
