// Launchers of what a step of generation needs besides the ops: one token of each sequence, on the CPU.
//
//   cache[row / group, head, places[row]] = row of keys, of values
//   x = activation(x)
//
// T is the dtype. A launcher returns null, or what is wrong.
//
// Source: Hendrycks and Gimpel 2016 (arXiv 1606.08415) for gelu and silu.
#pragma once

#include <cstdint>
#include <tuple>

#include "common/cpu_target.h"
#include "common/dtype.h"

namespace fastlm {

struct CacheWriteParams {
  const void* qkv;        // [rows, 3, heads, head_dim] T, of which the last two are written
  void* keys;             // [rows / group, heads, S, head_dim] T
  void* values;           // likewise
  const int64_t* places;  // [rows] in S, each of its own in a group
  int64_t rows, group, heads, head_dim, size;
  int64_t batch_stride, head_stride;  // of keys and of values, whose rows lie one after the other
  DType dtype;

  using P = CacheWriteParams;
  static constexpr auto fields() {
    return std::make_tuple(&P::qkv, &P::keys, &P::values, &P::places, &P::rows, &P::group, &P::heads, &P::head_dim,
                           &P::size, &P::batch_stride, &P::head_stride, &P::dtype);
  }
};

enum Activation : int { kGeluTanh, kGelu, kRelu, kSilu };

struct ActivationParams {
  void* x;  // [count] T, in place
  int64_t count;
  int activation;
  DType dtype;

  using P = ActivationParams;
  static constexpr auto fields() { return std::make_tuple(&P::x, &P::count, &P::activation, &P::dtype); }
};

FASTLM_CPU_LAUNCHER(cache_write_cpu, CacheWriteParams)
FASTLM_CPU_LAUNCHER(activation_cpu, ActivationParams)

}  // namespace fastlm
