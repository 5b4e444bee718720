// Forward of layer norm and RMS norm, alone or after adding to a residual stream; equations in layer_norm.h.
//
// A thread keeps its elements of the row in registers, in fp32: the row is read once, the mean is formed first and the
// variance from the deviations. Up to 512 columns a row is one warp's and no barrier is needed; beyond, a block's, up
// to 8,192 columns. Longer rows have a kernel that reads the row three times, from cache where it fits. Rows that are
// not aligned to vectors, or of odd sizes, are accessed element by element.
//
// Bytes of global memory per row of C elements of e bytes: 2Ce, with a residual 4Ce; statistics 8. Long rows: 4Ce and
// 6Ce.
#include "common/dispatch.cuh"
#include "common/kernel_attributes.h"
#include "common/philox.h"
#include "common/row_tile.cuh"
#include "common/vec.cuh"
#include "layer_norm/layer_norm.h"

namespace fastlm {
namespace {

struct Fwd {
  LayerNormFwdParams p;
  Dropout dropout;
};

// Where a row lies.
template <typename T, typename R>
struct FwdRow {
  int64_t row;
  const T* input;
  const R* residual;
  R* new_residual;
  T* output;

  __device__ FwdRow(const LayerNormFwdParams& p, int64_t row)
      : row(row),
        input(static_cast<const T*>(p.input) + p.rows.offset(row, p.input_strides)),
        residual(static_cast<const R*>(p.residual) + p.rows.offset(row, p.residual_strides)),
        new_residual(static_cast<R*>(p.new_residual) + row * p.cols),
        output(static_cast<T*>(p.output) + row * p.cols) {}
};

// kWidth neighbours of what is normalised: the input, or the sum with the residual, rounded as it is stored. `kept` has
// a bit for each.
template <typename T, typename R, int kWidth>
__device__ void load_sum(const Fwd& f, const FwdRow<T, R>& at, int64_t column, uint32_t kept, float (&x)[kWidth]) {
  load<kWidth>(at.input + column, x);
  if (f.p.residual == nullptr) return;
  float residual[kWidth];
  load<kWidth>(at.residual + column, residual);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) x[i] = to_float(from_float<R>(f.dropout(x[i], kept >> i & 1) + residual[i]));
  store<kWidth>(at.new_residual + column, x);
}

template <typename T, int kWidth>
__device__ void store_output(const LayerNormFwdParams& p, T* output, int64_t column, const float (&x)[kWidth],
                             float mean, float rstd) {
  float weight[kWidth], bias[kWidth], y[kWidth];
  load_parameter<kWidth>(p.weight, p.parameter_dtype, column, 1.0f, weight);
  load_parameter<kWidth>(p.bias, p.parameter_dtype, column, 0.0f, bias);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) y[i] = (x[i] - mean) * rstd * weight[i] + bias[i];
  store<kWidth>(output + column, y);
}

__device__ void store_stats(const LayerNormFwdParams& p, int64_t row, float mean, float rstd) {
  float* stats = static_cast<float*>(p.stats);
  if (!p.rms) stats[row] = mean;
  stats[row + (p.rms ? 0 : p.rows.count())] = rstd;
}

template <typename T, typename R, int kWidth>
__global__ void __launch_bounds__(kMaxThreads, kWidth == 1 ? 1 : 2)
    layer_norm_fwd_kernel(const __grid_constant__ Fwd f) {
  const LayerNormFwdParams& p = f.p;
  FASTLM_SHARED(float, scratch, [2][kMaxWarps]);
  RowSum row_sum(scratch);
  const int64_t rows = p.rows.count(), step = int64_t{gridDim.x} * blockDim.y;
  for (int64_t first = int64_t{blockIdx.x} * blockDim.y; first < rows; first += step) {
    const int64_t row = first + threadIdx.y;
    const int cols =
        row < rows ? static_cast<int>(p.cols) : 0;  // past the last row there is nothing to do, but barriers to meet at
    const FwdRow<T, R> at(p, row);
    const uint32_t kept = kept_elements<kWidth>(f.dropout, p.rng_state, row);
    float x[kElements / kWidth][kWidth];

    float sum = 0.0f;
    for_vectors<kWidth>(cols, [&](int v, int column) {
      load_sum<T, R, kWidth>(f, at, column, kept >> (v * kWidth), x[v]);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sum += x[v][i];
    });
    const float mean = p.rms ? 0.0f : row_sum(sum) / p.cols;

    float squares = 0.0f;
    for_vectors<kWidth>(cols, [&](int v, int) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) squares += (x[v][i] - mean) * (x[v][i] - mean);
    });
    const float rstd = rsqrtf(row_sum(squares) / p.cols + static_cast<float>(p.eps));

    for_vectors<kWidth>(cols,
                        [&](int v, int column) { store_output<T, kWidth>(p, at.output, column, x[v], mean, rstd); });
    if (cols != 0 && threadIdx.x == 0) store_stats(p, row, mean, rstd);
  }
}

// A block walks along a row three times. What it reads again of new_residual each thread has written itself.
template <typename T, typename R>
__global__ void __launch_bounds__(kMaxThreads) layer_norm_fwd_long_kernel(const __grid_constant__ Fwd f) {
  const LayerNormFwdParams& p = f.p;
  FASTLM_SHARED(float, scratch, [2][kMaxWarps]);
  RowSum row_sum(scratch);
  for (int64_t row = blockIdx.x; row < p.rows.count(); row += gridDim.x) {
    const FwdRow<T, R> at(p, row);
    const auto again = [&](int64_t column) {
      return p.residual == nullptr ? to_float(at.input[column]) : to_float(at.new_residual[column]);
    };
    float sum = 0.0f;
    FASTLM_NO_UNROLL
    for (int64_t column = threadIdx.x; column < p.cols; column += blockDim.x) {
      float x[1];
      load_sum<T, R, 1>(f, at, column, f.dropout.kept<1>(p.rng_state, row, column), x);
      sum += x[0];
    }
    const float mean = p.rms ? 0.0f : row_sum(sum) / p.cols;

    float squares = 0.0f;
    FASTLM_NO_UNROLL
    for (int64_t column = threadIdx.x; column < p.cols; column += blockDim.x) {
      const float x = again(column) - mean;
      squares += x * x;
    }
    const float rstd = rsqrtf(row_sum(squares) / p.cols + static_cast<float>(p.eps));

    FASTLM_NO_UNROLL
    for (int64_t column = threadIdx.x; column < p.cols; column += blockDim.x) {
      const float x[1] = {again(column)};
      store_output<T, 1>(p, at.output, column, x, mean, rstd);
    }
    if (threadIdx.x == 0) store_stats(p, row, mean, rstd);
  }
}

template <typename T, typename R>
const char* fwd(const LayerNormFwdParams& p, int device, void* stream) {
  constexpr int kWidth = kVector<T, R>;
  const Fwd f = {p, Dropout(p.dropout_p)};
  const Four contiguous = {{p.cols, 0, 0, 0}}, none = {{0, 0, 0, 0}};
  const bool aligned = is_aligned(static_cast<const T*>(p.input), p.input_strides, p.cols, kWidth) &&
                       is_aligned(static_cast<const R*>(p.residual), p.residual_strides, p.cols, kWidth) &&
                       is_aligned(static_cast<T*>(p.output), contiguous, p.cols, kWidth) &&
                       is_aligned(static_cast<R*>(p.new_residual), contiguous, p.cols, kWidth) &&
                       is_aligned(static_cast<const char*>(p.weight), none, kMaxAccess, kMaxAccess) &&
                       is_aligned(static_cast<const char*>(p.bias), none, kMaxAccess, kMaxAccess);
  const dim3 block = block_for(p.cols);
  if (block.x > kMaxThreads) {
    return launch(layer_norm_fwd_long_kernel<T, R>, grid_for(p.rows.count(), 1), kMaxThreads, f, device, stream);
  }
  const auto kernel = aligned ? layer_norm_fwd_kernel<T, R, kWidth> : layer_norm_fwd_kernel<T, R, 1>;
  return launch(kernel, grid_for(p.rows.count(), block), block, f, device, stream);
}

template <typename T, typename R>
void register_kernels() {
  const std::string types = std::string("<") + kTypeName<T> + ", " + kTypeName<R>;
  register_kernel("layer_norm_fwd" + types + ", vectors>", layer_norm_fwd_kernel<T, R, kVector<T, R>>, kMaxThreads);
  register_kernel("layer_norm_fwd" + types + ", scalars>", layer_norm_fwd_kernel<T, R, 1>, kMaxThreads);
  register_kernel("layer_norm_fwd" + types + ", long>", layer_norm_fwd_long_kernel<T, R>, kMaxThreads);
}

const bool registered = [] {
  for_each_pair([](auto t, auto r) { register_kernels<decltype(t), decltype(r)>(); });
  return true;
}();

}  // namespace

const char* layer_norm_fwd(const LayerNormFwdParams& p, int device, void* stream) {
  return dispatch_pair(p.dtype, p.residual_dtype,
                       [&](auto t, auto r) { return fwd<decltype(t), decltype(r)>(p, device, stream); });
}

}  // namespace fastlm
