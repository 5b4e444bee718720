// Launchers of CUDA kernels, bound under their own names: of fastlm._C, and of whatever else runs the same kernels.
#pragma once

#include "attention/attention.h"
#include "common/bind.h"
#include "cross_entropy/cross_entropy.h"
#include "layer_norm/layer_norm.h"

namespace fastlm {

inline void bind_cuda_launchers(pybind11::module_& m) {
  bind<&attention_fwd>(m, "attention_fwd");
  bind<&attention_bwd>(m, "attention_bwd");
  bind<&layer_norm_fwd>(m, "layer_norm_fwd");
  bind<&layer_norm_bwd>(m, "layer_norm_bwd");
  bind<&cross_entropy_fwd>(m, "cross_entropy_fwd");
  bind<&cross_entropy_sum>(m, "cross_entropy_sum");
  bind<&cross_entropy_bwd>(m, "cross_entropy_bwd");
}

}  // namespace fastlm
