// Layer norm and RMS norm on the CPU, alone or after adding to a residual stream; equations in layer_norm.h.
//
// Rows are shared out among OpenMP's threads (torch's own pool). A row is read from memory once: the mean, the variance
// and the output are three passes over what the first level cache then holds, in fp32, while the next row is fetched.
// Backward shares out partial rows instead: each is the sum of the parameters' gradients over one run of rows, and a
// last pass adds them up in order, so that the result does not depend on the number of threads.
//
// Bytes of memory per row of C elements of e bytes: forward 2Ce, backward 3Ce, with a residual 4Ce each. Results larger
// than the caches are written past them.
#include <cmath>

#include "common/cpu_rows.h"
#include "common/huge_pages.h"
#include "layer_norm/layer_norm.h"

namespace fastlm {
namespace {

template <typename A, typename W>
void widen_row(const W* from, A* to, int64_t cols) {
  for_columns<A>(cols, [&](int64_t c, int64_t count, int) { store(to + c, load(from + c, count), count); });
}

// A parameter in A: where it lies if it is, else in `space`; `missing` everywhere if there is none.
template <typename A>
const A* parameter(const void* p, DType dtype, A missing, int64_t cols, A* space) {
  if (p != nullptr && (sizeof(A) == 8 || dtype == DType::kFloat32)) return static_cast<const A*>(p);
  if (p == nullptr) {
    for (int64_t c = 0; c < cols; ++c) space[c] = missing;
  } else if constexpr (sizeof(A) == 4) {
    dtype == DType::kBFloat16 ? widen_row(static_cast<const BFloat16*>(p), space, cols)
                              : widen_row(static_cast<const Half*>(p), space, cols);
  }
  return space;
}

template <typename A>
void dropout_row(double p, const int64_t* rng_state, int64_t row, int64_t cols, A* factors) {
  for (int64_t first = 0; first < cols; first += kDropoutColumns) {
    A block[kDropoutColumns];
    dropout_factors(p, rng_state, row, first, block);
    const int64_t count = cols - first < kDropoutColumns ? cols - first : kDropoutColumns;
    memcpy(factors + first, block, count * sizeof(A));
  }
}

template <typename T>
Result<T> result(void* data, int64_t row, const Rows& rows, int64_t cols) {
  return {static_cast<T*>(data) + row * cols, rows.count() * cols * int64_t{sizeof(T)}};
}

// Forward ------------------------------------------------------------------------------------------------------------

// Where the row after this one begins, to be fetched while this one is worked on.
template <typename T>
const T* row_after(const void* data, int64_t row, const Rows& rows, const Four& strides) {
  return static_cast<const T*>(data) + rows.offset(row + 1 < rows.count() ? row + 1 : row, strides);
}

// A row on its way through the three steps of forward.
template <typename A>
struct FwdRow {
  A* space;       // [cols] to keep what is normalised in
  const A* wide;  // [cols] what is normalised: in `space`, or the input itself
  A mean, rstd;
};

// Forms what is normalised, and its mean.
template <typename T, typename R, typename A>
void fwd_sum(const LayerNormFwdParams& p, int64_t row, A* factors, FwdRow<A>& state) {
  const int64_t cols = p.cols;
  const T* input = static_cast<const T*>(p.input) + p.rows.offset(row, p.input_strides);
  A* space = state.space;
  Sums<A> sums;
  if (p.residual == nullptr) {
    for_columns<A>(cols, [&](int64_t c, int64_t count, int chain) {
      const Vec<A> x = load(input + c, count);
      if constexpr (sizeof(T) != sizeof(A)) store(space + c, x);
      sums.chains[chain] += x;
    });
  } else {
    const R* residual = static_cast<const R*>(p.residual) + p.rows.offset(row, p.residual_strides);
    const Result<R> new_residual = result<R>(p.new_residual, row, p.rows, cols);
    if (p.rng_state != nullptr) dropout_row(p.dropout_p, p.rng_state, row, cols, factors);
    for_columns<A>(cols, [&](int64_t c, int64_t count, int chain) {
      Vec<A> x = load(input + c, count);
      if (p.rng_state != nullptr) x = dropped(x, load(factors + c, count));
      const Packed<R> rounded = Pack<R>::bits(x + load(residual + c, count));
      x = load(reinterpret_cast<const R*>(&rounded));
      new_residual.put(c, x, count);
      store(space + c, x);
      sums.chains[chain] += x;
    });
  }
  state.wide = space;
  if constexpr (sizeof(T) == sizeof(A)) {
    if (p.residual == nullptr) state.wide = input;
  }
  state.mean = p.rms ? A{0} : sums.total() / static_cast<A>(cols);
}

template <typename T, typename A>
void fwd_variance(const LayerNormFwdParams& p, int64_t row, FwdRow<A>& state) {
  const T* next = row_after<T>(p.input, row + 1, p.rows, p.input_strides);  // of the row whose sum is formed next
  Sums<A> squares;
  for_columns<A>(p.cols, [&](int64_t c, int64_t count, int chain) {
    __builtin_prefetch(next + c);
    const Vec<A> centred = first<A>(load(state.wide + c, count) - state.mean, count);
    squares.chains[chain] = multiply_add(centred, centred, squares.chains[chain]);
  });
  state.rstd = 1 / std::sqrt(squares.total() / static_cast<A>(p.cols) + static_cast<A>(p.eps));
}

template <typename T, typename A>
void fwd_output(const LayerNormFwdParams& p, int64_t row, const A* weight, const A* bias, const FwdRow<A>& state) {
  const Result<T> output = result<T>(p.output, row, p.rows, p.cols);
  for_columns<A>(p.cols, [&](int64_t c, int64_t count, int) {
    const Vec<A> x_hat = (load(state.wide + c, count) - state.mean) * state.rstd;
    output.put(c, multiply_add(x_hat, load(weight + c, count), load(bias + c, count)), count);
  });
  A* stats = static_cast<A*>(p.stats);
  if (!p.rms) stats[row] = state.mean;
  stats[row + (p.rms ? 0 : p.rows.count())] = state.rstd;
}

template <typename T, typename R>
const char* fwd(const LayerNormFwdParams& p) {
  using A = typename Arithmetic<T>::type;
  const int64_t rows = p.rows.count();
  const int threads = threads_for(rows, rows * p.cols);
  Workspace<A> space(2 + 4 * threads, p.cols);
  if (space.failed()) return "out of memory";
  const A* weight = parameter<A>(p.weight, p.parameter_dtype, 1, p.cols, space.row(0));
  const A* bias = parameter<A>(p.bias, p.parameter_dtype, 0, p.cols, space.row(1));
  prefer_huge_pages(p.output, rows * p.cols * sizeof(T));
  prefer_huge_pages(p.new_residual, rows * p.cols * sizeof(R));
#pragma omp parallel num_threads(threads)
  {
    const int64_t n = omp_get_num_threads(), id = omp_get_thread_num();
    const int64_t first = rows * id / n, last = rows * (id + 1) / n;
    A* factors = space.row(2 + 4 * id);
    FwdRow<A> states[3] = {{space.row(3 + 4 * id)}, {space.row(4 + 4 * id)}, {space.row(5 + 4 * id)}};
    // Three rows at a time, each a step behind the other, so that none waits for its own sums.
    for (int64_t row = first; row < last + 2; ++row) {
      if (row < last) fwd_sum<T, R, A>(p, row, factors, states[row % 3]);
      if (row > first && row <= last) fwd_variance<T, A>(p, row - 1, states[(row - 1) % 3]);
      if (row > first + 1) fwd_output<T, A>(p, row - 2, weight, bias, states[(row - 2) % 3]);
    }
    stream_end();
  }
  return nullptr;
}

// Backward -----------------------------------------------------------------------------------------------------------

// A row on its way through the two steps of backward.
template <typename A>
struct BwdRow {
  A* x_hat;  // [cols] to keep x_hat in
  A* g;      // [cols] to keep g in
  A rstd, mean_g, mean_gx;
};

// Adds to the gradients of the parameters, and forms x_hat, g and their means.
template <typename T, typename R, typename A>
void bwd_sums(const LayerNormBwdParams& p, int64_t row, const A* weight, A* grad_weight, A* grad_bias,
              BwdRow<A>& state) {
  const A* stats = static_cast<const A*>(p.stats);
  const A mean = p.rms ? A{0} : stats[row], rstd = stats[row + (p.rms ? 0 : p.rows.count())];
  A *x_hats = state.x_hat, *gs = state.g;
  const T* grad_output = static_cast<const T*>(p.grad_output) + p.rows.offset(row, p.grad_output_strides);
  const R* normalized = static_cast<const R*>(p.normalized) + p.rows.offset(row, p.normalized_strides);
  Sums<A> sums, products;
  if (p.grad_output != nullptr) {
    for_columns<A>(p.cols, [&](int64_t c, int64_t count, int chain) {
      const Vec<A> grad = load(grad_output + c, count);
      const Vec<A> x_hat = first<A>((load(normalized + c, count) - mean) * rstd, count);
      const Vec<A> g = grad * load(weight + c, count);
      sums.chains[chain] += g;
      products.chains[chain] = multiply_add(g, x_hat, products.chains[chain]);
      store(x_hats + c, x_hat);
      store(gs + c, g);
      store(grad_weight + c, multiply_add(grad, x_hat, load(grad_weight + c)));
      store(grad_bias + c, load(grad_bias + c) + grad);
    });
  }
  state.rstd = rstd;
  state.mean_g = p.rms ? A{0} : sums.total() / static_cast<A>(p.cols);
  state.mean_gx = products.total() / static_cast<A>(p.cols);
}

template <typename T, typename R, typename A>
void bwd_grads(const LayerNormBwdParams& p, int64_t row, A* factors, const BwdRow<A>& state) {
  if (p.grad_input == nullptr && p.grad_residual == nullptr) return;
  const A rstd = state.rstd, mean_g = state.mean_g, mean_gx = state.mean_gx;
  const A *x_hats = state.x_hat, *gs = state.g;
  const T* next_grad = row_after<T>(p.grad_output, row + 1, p.rows, p.grad_output_strides);
  const R* next_x = row_after<R>(p.normalized, row + 1, p.rows, p.normalized_strides);
  const R* grad_new_residual =
      static_cast<const R*>(p.grad_new_residual) + p.rows.offset(row, p.grad_new_residual_strides);
  const Result<T> grad_input = result<T>(p.grad_input, row, p.rows, p.cols);
  const Result<R> grad_residual = result<R>(p.grad_residual, row, p.rows, p.cols);
  if (p.rng_state != nullptr) dropout_row(p.dropout_p, p.rng_state, row, p.cols, factors);
  // Twice: without a residual's gradients and dropout no vector should ask for them.
  const auto finish = [&](auto plain) {
    for_columns<A>(p.cols, [&](int64_t c, int64_t count, int) {
      __builtin_prefetch(next_grad + c);
      __builtin_prefetch(next_x + c);
      Vec<A> grad{};
      if (plain.value || p.grad_output != nullptr) {
        grad = rstd * multiply_add(load(x_hats + c), broadcast(-mean_gx), load(gs + c) - mean_g);
      }
      if (plain.value) return grad_input.put(c, grad, count);
      if (p.grad_new_residual != nullptr) grad += load(grad_new_residual + c, count);
      if (p.grad_residual != nullptr) grad_residual.put(c, grad, count);
      if (p.rng_state != nullptr) grad = dropped(grad, load(factors + c, count));
      if (p.grad_input != nullptr) grad_input.put(c, grad, count);
    });
  };
  const bool extras = p.grad_new_residual != nullptr || p.grad_residual != nullptr || p.rng_state != nullptr;
  p.grad_output != nullptr && !extras ? finish(Constant<true>{}) : finish(Constant<false>{});
}

// Columns first to last of a parameter's gradient: the partial rows added up in order, in `total`.
template <typename W, typename A>
void add_up(const A* partials, int64_t partial_rows, int64_t cols, int64_t first, int64_t last, A* total, W* gradient) {
  for (int64_t c = first; c < last; ++c) total[c] = 0;
  for (int64_t n = 0; n < partial_rows; ++n) {
    for (int64_t c = first; c < last; ++c) total[c] += partials[n * cols + c];
  }
  for_columns<A>(last - first, [&](int64_t c, int64_t count, int) {
    store(gradient + first + c, load(total + first + c, count), count);
  });
}

template <typename A>
void parameter_gradient(const A* partials, int64_t partial_rows, int64_t cols, int64_t first, int64_t last, A* total,
                        DType dtype, void* gradient) {
  if (gradient == nullptr) return;
  if constexpr (sizeof(A) == 8) {
    add_up(partials, partial_rows, cols, first, last, total, static_cast<double*>(gradient));
  } else if (dtype == DType::kFloat32) {
    add_up(partials, partial_rows, cols, first, last, total, static_cast<float*>(gradient));
  } else if (dtype == DType::kBFloat16) {
    add_up(partials, partial_rows, cols, first, last, total, static_cast<BFloat16*>(gradient));
  } else {
    add_up(partials, partial_rows, cols, first, last, total, static_cast<Half*>(gradient));
  }
}

template <typename T, typename R>
const char* bwd(const LayerNormBwdParams& p) {
  using A = typename Arithmetic<T>::type;
  const int64_t rows = p.rows.count(), runs = p.partial_rows;
  const int threads = threads_for(rows, rows * p.cols);
  Workspace<A> space(1 + 7 * threads, p.cols);
  if (space.failed()) return "out of memory";
  const A* weight = parameter<A>(p.weight, p.parameter_dtype, 1, p.cols, space.row(0));
  A* partials = static_cast<A*>(p.partials);
  prefer_huge_pages(p.grad_input, rows * p.cols * sizeof(T));
  prefer_huge_pages(p.grad_residual, rows * p.cols * sizeof(R));
#pragma omp parallel num_threads(threads)
  {
    const int64_t n = omp_get_num_threads(), id = omp_get_thread_num();
    A *grad_weight = space.row(1 + 7 * id), *grad_bias = space.row(2 + 7 * id), *factors = space.row(3 + 7 * id);
    BwdRow<A> states[2] = {{space.row(4 + 7 * id), space.row(5 + 7 * id)},
                           {space.row(6 + 7 * id), space.row(7 + 7 * id)}};
    for (int64_t run = runs * id / n; run < runs * (id + 1) / n; ++run) {
      for (int64_t c = 0; c < p.cols; ++c) grad_weight[c] = grad_bias[c] = 0;
      const int64_t first = rows * run / runs, last = rows * (run + 1) / runs;
      // Two rows at a time, one a step behind the other, so that none waits for its own sums.
      for (int64_t row = first; row < last + 1; ++row) {
        if (row < last) bwd_sums<T, R, A>(p, row, weight, grad_weight, grad_bias, states[row % 2]);
        if (row > first) bwd_grads<T, R, A>(p, row - 1, factors, states[(row - 1) % 2]);
      }
      memcpy(partials + run * p.cols, grad_weight, p.cols * sizeof(A));
      memcpy(partials + (runs + run) * p.cols, grad_bias, p.cols * sizeof(A));
    }
    stream_end();
#pragma omp barrier
    const int64_t first = p.cols * id / n, last = p.cols * (id + 1) / n;
    const A* bias_partials = partials + runs * p.cols;
    parameter_gradient(partials, runs, p.cols, first, last, grad_weight, p.parameter_dtype, p.grad_weight);
    parameter_gradient(bias_partials, runs, p.cols, first, last, grad_bias, p.parameter_dtype, p.grad_bias);
  }
  return nullptr;
}

// The instantiation for the params' dtypes; double goes with double alone.
#define FASTLM_DISPATCH(function, p)                                                           \
  switch (p.dtype) {                                                                           \
    case DType::kFloat64:                                                                      \
      return p.residual_dtype == DType::kFloat64 ? function<double, double>(p) : kUnsupported; \
    case DType::kFloat32:                                                                      \
      FASTLM_DISPATCH_RESIDUAL(function, float, p)                                             \
    case DType::kBFloat16:                                                                     \
      FASTLM_DISPATCH_RESIDUAL(function, BFloat16, p)                                          \
    case DType::kFloat16:                                                                      \
      FASTLM_DISPATCH_RESIDUAL(function, Half, p)                                              \
  }                                                                                            \
  return kUnsupported;
#define FASTLM_DISPATCH_RESIDUAL(function, T, p)                             \
  if (p.residual_dtype == DType::kFloat32) return function<T, float>(p);     \
  if (p.residual_dtype == DType::kBFloat16) return function<T, BFloat16>(p); \
  return p.residual_dtype == DType::kFloat16 ? function<T, Half>(p) : kUnsupported;

constexpr const char* kUnsupported = "the dtypes of input and residual do not go together";

}  // namespace

namespace FASTLM_CPU_TARGET {

const char* layer_norm_fwd_cpu(const LayerNormFwdParams& p) { FASTLM_DISPATCH(fwd, p) }
const char* layer_norm_bwd_cpu(const LayerNormBwdParams& p) { FASTLM_DISPATCH(bwd, p) }

}  // namespace FASTLM_CPU_TARGET

#if FASTLM_CPU_BASELINE
FASTLM_CPU_DISPATCH(layer_norm_fwd_cpu, LayerNormFwdParams)
FASTLM_CPU_DISPATCH(layer_norm_bwd_cpu, LayerNormBwdParams)
#endif

}  // namespace fastlm
