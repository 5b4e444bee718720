// Backward of layer norm and RMS norm, alone or after adding to a residual stream; equations in layer_norm.h.
//
// A thread keeps its elements of x_hat and of the upstream gradient in registers, in fp32, so that each is read once. A
// block walks through rows that are as far apart as there are blocks, and sums the gradients of weight and bias of its
// columns in registers as it goes; it leaves one partial row of each, and a second kernel adds these up in order. The
// number of blocks is the number of partial rows, which the caller fixes by the shape alone: no atomics, the same bits
// on every GPU. Up to 8,192 columns; longer rows have a kernel that reads the row twice and sums in its partial row.
//
// Bytes of global memory per row of C elements of e bytes: 3Ce, with a residual 4Ce if the gradients of input and
// residual are one; statistics 8. Partial rows: 16C each, written and read. Long rows: 5Ce and 16C.
#include "common/dispatch.cuh"
#include "common/kernel_attributes.h"
#include "common/philox.h"
#include "common/row_tile.cuh"
#include "common/vec.cuh"
#include "layer_norm/layer_norm.h"

namespace fastlm {
namespace {

constexpr int kNarrowThreads = kNarrowBlock / 2;  // of a row, where rows share a block, at most
constexpr int kSumRows = 16;                      // partial rows summed at a time

struct Bwd {
  LayerNormBwdParams p;
  Dropout dropout;
};

__device__ float load_mean(const LayerNormBwdParams& p, int64_t row) {
  return p.rms ? 0.0f : static_cast<const float*>(p.stats)[row];
}

__device__ float load_rstd(const LayerNormBwdParams& p, int64_t row) {
  return static_cast<const float*>(p.stats)[row + (p.rms ? 0 : p.rows.count())];
}

// Where a row lies.
template <typename T, typename R>
struct BwdRow {
  int64_t row;
  const T* grad_output;
  const R* grad_new_residual;
  const R* normalized;
  T* grad_input;
  R* grad_residual;

  __device__ BwdRow(const LayerNormBwdParams& p, int64_t row)
      : row(row),
        grad_output(static_cast<const T*>(p.grad_output) + p.rows.offset(row, p.grad_output_strides)),
        grad_new_residual(static_cast<const R*>(p.grad_new_residual) + p.rows.offset(row, p.grad_new_residual_strides)),
        normalized(static_cast<const R*>(p.normalized) + p.rows.offset(row, p.normalized_strides)),
        grad_input(static_cast<T*>(p.grad_input) + row * p.cols),
        grad_residual(static_cast<R*>(p.grad_residual) + row * p.cols) {}
};

// kWidth neighbours of the upstream gradient, of it times the weight, and of x_hat.
template <typename T, typename R, int kWidth>
__device__ void load_upstream(const LayerNormBwdParams& p, const BwdRow<T, R>& at, int64_t column, float mean,
                              float rstd, float (&grad)[kWidth], float (&g)[kWidth], float (&x_hat)[kWidth]) {
  load<kWidth>(at.grad_output + column, grad);
  load<kWidth>(at.normalized + column, x_hat);
  load_parameter<kWidth>(p.weight, p.parameter_dtype, column, 1.0f, g);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    x_hat[i] = (x_hat[i] - mean) * rstd;
    g[i] = __fmul_rn(grad[i], g[i]);  // one product wherever it is used: a fused one would not cancel against its mean
  }
}

// Adds the residual's upstream gradient to the one that came through the norm, and writes the results. `kept` has a bit
// for each.
template <typename T, typename R, int kWidth>
__device__ void store_grads(const Bwd& f, const BwdRow<T, R>& at, int64_t column, uint32_t kept,
                            float (&grad)[kWidth]) {
  const LayerNormBwdParams& p = f.p;
  if (p.grad_new_residual != nullptr) {
    float upstream[kWidth];
    load<kWidth>(at.grad_new_residual + column, upstream);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) grad[i] += upstream[i];
  }
  if (p.grad_residual != nullptr) store<kWidth>(at.grad_residual + column, grad);
  if (p.grad_input == nullptr) return;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) grad[i] = f.dropout(grad[i], kept >> i & 1);
  store<kWidth>(at.grad_input + column, grad);
}

// Writes this block's partial row: the sums of its rows of threads, added in order.
template <int kWidth>
__device__ void store_partial(const LayerNormBwdParams& p, float (&sums)[kElements / kWidth][kWidth],
                              float (&tile)[kElements][kNarrowThreads], float* partial) {
  for (int y = 1; y < static_cast<int>(blockDim.y); ++y) {
    __syncthreads();  // the tile has been read
    for (int e = 0; e < kElements && static_cast<int>(threadIdx.y) == y; ++e) {
      tile[e][threadIdx.x] = sums[e / kWidth][e % kWidth];
    }
    __syncthreads();
    for (int e = 0; e < kElements && threadIdx.y == 0; ++e) {
      sums[e / kWidth][e % kWidth] += tile[e][threadIdx.x];
    }
  }
  if (threadIdx.y != 0) return;
  for_vectors<kWidth>(static_cast<int>(p.cols), [&](int v, int column) { store<kWidth>(partial + column, sums[v]); });
}

template <typename T, typename R, int kWidth>
__global__ void __launch_bounds__(kMaxThreads) layer_norm_bwd_kernel(const __grid_constant__ Bwd f) {
  const LayerNormBwdParams& p = f.p;
  FASTLM_SHARED(float, scratch, [2][kMaxWarps]);
  FASTLM_SHARED(float, tile, [kElements][kNarrowThreads]);
  RowSum row_sum(scratch);
  float weight_sums[kElements / kWidth][kWidth] = {}, bias_sums[kElements / kWidth][kWidth] = {};
  const int64_t rows = p.rows.count(), step = int64_t{gridDim.x} * blockDim.y;
  for (int64_t first = int64_t{blockIdx.x} * blockDim.y; first < rows; first += step) {
    const int64_t row = first + threadIdx.y;
    const int cols =
        row < rows ? static_cast<int>(p.cols) : 0;  // past the last row there is nothing to do, but barriers to meet at
    const BwdRow<T, R> at(p, row);
    const uint32_t kept = kept_elements<kWidth>(f.dropout, p.rng_state, row);
    float g[kElements / kWidth][kWidth], x_hat[kElements / kWidth][kWidth];
    float mean_g = 0.0f, mean_gx = 0.0f, rstd = 0.0f;
    if (p.grad_output != nullptr) {
      const float mean = cols != 0 ? load_mean(p, row) : 0.0f;
      rstd = cols != 0 ? load_rstd(p, row) : 0.0f;
      for_vectors<kWidth>(cols, [&](int v, int column) {
        float grad[kWidth];
        load_upstream<T, R, kWidth>(p, at, column, mean, rstd, grad, g[v], x_hat[v]);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          weight_sums[v][i] += grad[i] * x_hat[v][i];
          bias_sums[v][i] += grad[i];
          mean_g += g[v][i];
          mean_gx += g[v][i] * x_hat[v][i];
        }
      });
      mean_g = p.rms ? 0.0f : row_sum(mean_g) / p.cols;
      mean_gx = row_sum(mean_gx) / p.cols;
    }
    if (p.grad_input == nullptr && p.grad_residual == nullptr) continue;
    for_vectors<kWidth>(cols, [&](int v, int column) {
      float grad[kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        grad[i] = p.grad_output == nullptr ? 0.0f : rstd * (g[v][i] - mean_g - x_hat[v][i] * mean_gx);
      }
      store_grads<T, R, kWidth>(f, at, column, kept >> (v * kWidth), grad);
    });
  }
  float* partial = static_cast<float*>(p.partials) + blockIdx.x * p.cols;
  if (p.grad_weight != nullptr) store_partial<kWidth>(p, weight_sums, tile, partial);
  if (p.grad_bias != nullptr) store_partial<kWidth>(p, bias_sums, tile, partial + p.partial_rows * p.cols);
}

// A block walks along each of its rows twice; a thread owns its columns of the partial rows.
template <typename T, typename R>
__global__ void __launch_bounds__(kMaxThreads) layer_norm_bwd_long_kernel(const __grid_constant__ Bwd f) {
  const LayerNormBwdParams& p = f.p;
  FASTLM_SHARED(float, scratch, [2][kMaxWarps]);
  RowSum row_sum(scratch);
  float* weight_partial = static_cast<float*>(p.partials) + blockIdx.x * p.cols;
  float* bias_partial = weight_partial + p.partial_rows * p.cols;
  for (int64_t row = blockIdx.x; row < p.rows.count(); row += gridDim.x) {
    const bool first = row == blockIdx.x;
    const BwdRow<T, R> at(p, row);
    const float mean = load_mean(p, row), rstd = load_rstd(p, row);
    float grad[1] = {0.0f}, g[1] = {0.0f}, x_hat[1] = {0.0f}, mean_g = 0.0f, mean_gx = 0.0f;
    FASTLM_NO_UNROLL
    for (int64_t column = threadIdx.x; column < p.cols; column += blockDim.x) {
      if (p.grad_output != nullptr) load_upstream<T, R, 1>(p, at, column, mean, rstd, grad, g, x_hat);
      weight_partial[column] = (first ? 0.0f : weight_partial[column]) + grad[0] * x_hat[0];
      bias_partial[column] = (first ? 0.0f : bias_partial[column]) + grad[0];
      mean_g += g[0];
      mean_gx += g[0] * x_hat[0];
    }
    mean_g = p.rms ? 0.0f : row_sum(mean_g) / p.cols;
    mean_gx = row_sum(mean_gx) / p.cols;
    FASTLM_NO_UNROLL
    for (int64_t column = threadIdx.x; column < p.cols; column += blockDim.x) {
      if (p.grad_output != nullptr) load_upstream<T, R, 1>(p, at, column, mean, rstd, grad, g, x_hat);
      grad[0] = p.grad_output == nullptr ? 0.0f : rstd * (g[0] - mean_g - x_hat[0] * mean_gx);
      store_grads<T, R, 1>(f, at, column, f.dropout.kept<1>(p.rng_state, row, column), grad);
    }
  }
}

// The gradient of weight (blockIdx.y == 0) or bias: 32 columns of all partial rows, kSumRows at a time, then these in
// order.
__global__ void __launch_bounds__(kWarp* kSumRows) layer_norm_bwd_sum_kernel(const __grid_constant__ Bwd f) {
  const LayerNormBwdParams& p = f.p;
  FASTLM_SHARED(float, sums, [kSumRows][kWarp]);
  const int64_t column = int64_t{blockIdx.x} * kWarp + threadIdx.x;
  const float* partials = static_cast<const float*>(p.partials) + blockIdx.y * p.partial_rows * p.cols;
  void* gradient = blockIdx.y == 0 ? p.grad_weight : p.grad_bias;
  if (gradient == nullptr) return;
  float sum = 0.0f;
  for (int64_t row = threadIdx.y; row < p.partial_rows && column < p.cols; row += kSumRows) {
    sum += partials[row * p.cols + column];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= p.cols) return;
  for (int row = 1; row < kSumRows; ++row) sum += sums[row][threadIdx.x];
  store_parameter(gradient, p.parameter_dtype, column, sum);
}

template <typename T, typename R>
const char* bwd(const LayerNormBwdParams& p, int device, void* stream) {
  constexpr int kWidth = kVector<T, R>;
  const Bwd f = {p, Dropout(p.dropout_p)};
  const Four contiguous = {{p.cols, 0, 0, 0}}, none = {{0, 0, 0, 0}};
  const bool aligned =
      is_aligned(static_cast<const T*>(p.grad_output), p.grad_output_strides, p.cols, kWidth) &&
      is_aligned(static_cast<const R*>(p.grad_new_residual), p.grad_new_residual_strides, p.cols, kWidth) &&
      is_aligned(static_cast<const R*>(p.normalized), p.normalized_strides, p.cols, kWidth) &&
      is_aligned(static_cast<T*>(p.grad_input), contiguous, p.cols, kWidth) &&
      is_aligned(static_cast<R*>(p.grad_residual), contiguous, p.cols, kWidth) &&
      is_aligned(static_cast<const char*>(p.weight), none, kMaxAccess, kMaxAccess);
  const dim3 block = block_for(p.cols), grid(static_cast<unsigned>(p.partial_rows));
  const char* error;
  if (block.x > kMaxThreads) {
    error = launch(layer_norm_bwd_long_kernel<T, R>, grid, dim3(kMaxThreads), f, device, stream);
  } else {
    const auto kernel = aligned ? layer_norm_bwd_kernel<T, R, kWidth> : layer_norm_bwd_kernel<T, R, 1>;
    error = launch(kernel, grid, block, f, device, stream);
  }
  if (error != nullptr || (p.grad_weight == nullptr && p.grad_bias == nullptr)) return error;
  const dim3 sums(static_cast<unsigned>((p.cols + kWarp - 1) / kWarp), 2);
  return launch(layer_norm_bwd_sum_kernel, sums, dim3(kWarp, kSumRows), f, device, stream);
}

template <typename T, typename R>
void register_kernels() {
  const std::string types = std::string("<") + kTypeName<T> + ", " + kTypeName<R>;
  register_kernel("layer_norm_bwd" + types + ", vectors>", layer_norm_bwd_kernel<T, R, kVector<T, R>>, kMaxThreads);
  register_kernel("layer_norm_bwd" + types + ", scalars>", layer_norm_bwd_kernel<T, R, 1>, kMaxThreads);
  register_kernel("layer_norm_bwd" + types + ", long>", layer_norm_bwd_long_kernel<T, R>, kMaxThreads);
}

const bool registered = [] {
  for_each_pair([](auto t, auto r) { register_kernels<decltype(t), decltype(r)>(); });
  register_kernel("layer_norm_bwd_sum", layer_norm_bwd_sum_kernel, kWarp * kSumRows);
  return true;
}();

}  // namespace

const char* layer_norm_bwd(const LayerNormBwdParams& p, int device, void* stream) {
  return dispatch_pair(p.dtype, p.residual_dtype,
                       [&](auto t, auto r) { return bwd<decltype(t), decltype(r)>(p, device, stream); });
}

}  // namespace fastlm
