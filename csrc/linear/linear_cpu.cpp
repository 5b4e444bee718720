// The linear layer for few rows on the CPU; equation in linear.h.
//
// With few rows the weight is all there is to read, once, and the bandwidth of memory is the bound. So it is read where
// it lies, in the order in which it lies, and fetched well before it is used: its rows are shared out among OpenMP's
// threads, and each meets, a few at a time, up to eight rows of the input, whose sums all stay in registers. The
// input comes from the caches, as what the weight is multiplied with: fp32; pairs of bf16, where there is an
// instruction for their dot products; or, for int8 weights where there is one for those of bytes, fixed point numbers
// of two or three bytes. Every element is one sum in the order of its columns, so that it depends neither on the number
// of threads nor on the other rows.
#include <cmath>

#include "common/cpu_rows.h"
#include "linear/linear.h"

namespace fastlm {
namespace {

constexpr int64_t kAhead = 8192;  // bytes: how far ahead of its use the weight is fetched to the second level cache
constexpr int64_t kFewColumns =
    12;  // of the output, which all rows of the input meet before the next ones, if they are many

inline void fetch(const void* weight) { __builtin_prefetch(static_cast<const char*>(weight) + kAhead, 0, 2); }

// body(number) with the rows that are left, at most kRows, as a constant.
template <int kRows, typename F>
void with_rows(int64_t left, const F& body) {
  if constexpr (kRows > 1) {
    if (left < kRows) return with_rows<kRows - 1>(left, body);
  }
  body(std::integral_constant<int, kRows>());
}

// multiply.run(number, row, column, last): `number` rows from `row` on, columns of the output from `column` to `last`.
template <typename M>
const char* run_all(const LinearFwdParams& p, int64_t rows, const M& multiply) {
#pragma omp parallel num_threads(threads_for(p.out_features, p.out_features* p.in_features* rows))
  {
    const int64_t n = omp_get_num_threads(), id = omp_get_thread_num();
    const int64_t first = p.out_features * id / n, last = p.out_features * (id + 1) / n;
    const int64_t at_a_time = rows > M::kMaxRows ? kFewColumns : last - first;
    for (int64_t column = first; column < last; column += at_a_time) {
      const int64_t stop = column + at_a_time < last ? column + at_a_time : last;
      for (int64_t row = 0; row < rows; row += M::kMaxRows) {
        with_rows<M::kMaxRows>(rows - row, [&](auto number) { multiply.run(number, row, column, stop); });
      }
    }
  }
  return nullptr;
}

// Rows of the input as what the weight is multiplied with, zeros beyond their end: of up to kMaxRows rows `step`
// elements of each, `parts` times for each row, then the next ones, as they are read.
template <typename X, int kMaxRows>
class Input {
 public:
  Input(int64_t rows, int64_t cols, int parts, int64_t step)
      : rows_(rows), parts_(parts), step_(step), row_((cols + step - 1) / step * step * parts), space_(1, rows * row_) {
    if (!failed()) memset(space_.row(0), 0, rows * row_ * sizeof(X));
  }

  bool failed() const { return space_.failed(); }
  const X* rows_from(int64_t row) const { return space_.row(0) + row * row_; }

  X* at(int64_t row, int64_t column, int part) const {
    const int64_t first = row / kMaxRows * kMaxRows, together = rows_ - first < kMaxRows ? rows_ - first : kMaxRows;
    const int64_t place = (column / step_ * together + row - first) * parts_ + part;
    return space_.row(0) + first * row_ + place * step_ + column % step_;
  }

 private:
  int64_t rows_, parts_, step_, row_;
  Workspace<X> space_;
};

// Elements of the output in one row, from their products' sums.
template <typename T, int kColumns, typename A>
inline void finish(const LinearFwdParams& p, int64_t row, int64_t column, Vec<A> y) {
  if (p.weight_scale != nullptr) y *= load(static_cast<const A*>(p.weight_scale) + column, kColumns);
  if (p.bias != nullptr) y += load(static_cast<const T*>(p.bias) + column, kColumns);
  store(static_cast<T*>(p.output) + row * p.out_features + column, y, kColumns);
}

// Each of the vectors' sum. `to` has room for kLanes more.
template <typename A, int kCount>
inline __attribute__((always_inline)) void sum_each(const Vec<A>* x, A* to) {
  constexpr int kAtOnce = kCount < kLanes<A> ? kCount : kLanes<A>;
  put(to, sums<A, kAtOnce>(x));
  if constexpr (kCount > kAtOnce) sum_each<A, kCount - kAtOnce>(x + kAtOnce, to + kAtOnce);
}

// Floats -------------------------------------------------------------------------------------------------------------

// How a weight of W is multiplied with an input of T: X is what rows of the input are made of beforehand, kStep columns
// are multiplied at a time.
template <typename T, typename W>
struct Products {
  using A = typename Arithmetic<T>::type;
  using X = A;
  using Operand = Vec<A>;
  static constexpr int64_t kStep = kLanes<A>;

  static Vec<A> weights(const W* from, int64_t count) { return load(from, count); }
  static Vec<A> multiply_add(Vec<A> w, Vec<A> x, Vec<A> sum) { return fastlm::multiply_add(w, x, sum); }
};

#if defined(__AVX512BF16__)
template <>
struct Products<BFloat16, BFloat16> {
  using A = float;
  using X = BFloat16;
  using Operand = Words;
  static constexpr int64_t kStep = 2 * kLanes<float>;

  static Words weights(const BFloat16* from, int64_t count) {
    if (count >= kStep) return get<Words>(from);
    Words words = {};
    memcpy(&words, from, count * sizeof(BFloat16));
    return words;
  }
  static Vec<float> multiply_add(Words w, Words x, Vec<float> sum) {
    return reinterpret_cast<Vec<float>>(
        _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(x)));
  }
};
#endif

template <typename T, typename W>
class Multiply {
 public:
  using P = Products<T, W>;
  using A = typename P::A;
  using X = typename P::X;
  static constexpr int kMaxRows = 8;  // of the input, at a time

  explicit Multiply(const LinearFwdParams& p) : p_(p), input_(p.rows.count(), p.in_features, 1, P::kStep) {
    if (failed()) return;
    for (int64_t row = 0; row < p.rows.count(); ++row) {
      const T* const from = static_cast<const T*>(p.input) + p.rows.offset(row, p.input_strides);
      for (int64_t c = 0; c < p.in_features; c += P::kStep) {
        const int64_t count = p.in_features - c < P::kStep ? p.in_features - c : P::kStep;
        if constexpr (sizeof(X) == sizeof(T)) {
          memcpy(input_.at(row, c, 0), from + c, count * sizeof(T));
        } else {
          store(input_.at(row, c, 0), load(from + c, count), count);
        }
      }
    }
  }

  bool failed() const { return input_.failed(); }

  // One run through memory is the fastest to read, but the more rows the input has, the more there is to gain from
  // loading them for several rows of the weight. AVX-512 has 32 registers for sums, the others 16.
  template <int kRows>
  void run(std::integral_constant<int, kRows>, int64_t row, int64_t column, int64_t last) const {
    constexpr int kColumns = kRows <= 2 ? 1 : kVectorBytes == 64 ? (kRows <= 4 ? 4 : 3) : kRows <= 4 ? 2 : 1;
    for (; column + kColumns <= last; column += kColumns) multiply<kRows, kColumns>(row, column);
    for (; column < last; ++column) multiply<kRows, 1>(row, column);
  }

 private:
  template <int kRows, int kColumns>
  inline __attribute__((always_inline)) void multiply(int64_t row, int64_t column) const {
    const W* const weight = static_cast<const W*>(p_.weight) + column * p_.weight_stride;
    const X* const x = input_.rows_from(row);
    Vec<A> total[kRows * kColumns] = {};
    const auto step = [&](int64_t k, int64_t count) __attribute__((always_inline)) {
      typename P::Operand w[kColumns];
      FASTLM_UNROLL for (int c = 0; c < kColumns; ++c) {
        w[c] = P::weights(weight + c * p_.weight_stride + k, count);
        fetch(weight + c * p_.weight_stride + k);
      }
      FASTLM_UNROLL for (int r = 0; r < kRows; ++r) {
        const auto one = get<typename P::Operand>(x + k * kRows + r * P::kStep);
        FASTLM_UNROLL for (int c = 0; c < kColumns; ++c) {
          total[r * kColumns + c] = P::multiply_add(w[c], one, total[r * kColumns + c]);
        }
      }
    };
    int64_t k = 0;
    for (; k + P::kStep <= p_.in_features; k += P::kStep) step(k, P::kStep);
    if (k < p_.in_features) step(k, p_.in_features - k);
    A y[kRows * kColumns + kLanes<A>];
    sum_each<A, kRows * kColumns>(total, y);
    FASTLM_UNROLL for (int r = 0; r < kRows; ++r) finish<T, kColumns, A>(p_, row + r, column, load(y + r * kColumns));
  }

  const LinearFwdParams& p_;
  Input<X, kMaxRows> input_;
};

// Bytes --------------------------------------------------------------------------------------------------------------

#if defined(__AVX512VNNI__)
// An int8 weight with an input whose rows are fixed point numbers of kBytes bytes, in units of `unit`:
//
//   x = unit * (first - 128 * 256^(kBytes - 1) + second * 256^(kBytes - 2) + ..)
//
// Sums of products of bytes, one for each lane, are exact. Beside those of the rows there is the weight's own, for the
// 128.
template <typename T, int kBytes>
class MultiplyBytes {
 public:
  static constexpr int kMaxRows = kBytes == 2 ? 4 : 3;
  static constexpr int64_t kStep = 64, kMostColumns = 1 << 16;  // of the input: sums fit 31 bits

  explicit MultiplyBytes(const LinearFwdParams& p)
      : p_(p), input_(p.rows.count(), p.in_features, kBytes, kStep), units_(1, p.rows.count()) {
    if (failed()) return;
    serves_ = p.in_features <= kMostColumns;
    for (int64_t row = 0; row < p.rows.count() && serves_; ++row) serves_ = fill(row);
  }

  bool failed() const { return input_.failed() || units_.failed(); }
  bool serves() const { return serves_; }

  template <int kRows>
  void run(std::integral_constant<int, kRows>, int64_t row, int64_t column, int64_t last) const {
    constexpr int kColumns = kRows == 1 ? 1 : kRows * kBytes < 9 ? 3 : 2;
    for (; column + kColumns <= last; column += kColumns) multiply<kRows, kColumns>(row, column);
    for (; column < last; ++column) multiply<kRows, 1>(row, column);
  }

 private:
  // Returns false for what has no such form: infinite, NaN, or so small or large that its unit would have none.
  bool fill(int64_t row) {
    const T* const from = static_cast<const T*>(p_.input) + p_.rows.offset(row, p_.input_strides);
    Vec<float> most = {};
    bool finite = true;
    for_columns<float>(p_.in_features, [&](int64_t c, int64_t count, int) {
      const Vec<float> x = load(from + c, count);
      most = max(x > 0 ? x : -x, most);
      finite = finite && !any(!(x - x == 0));
    });
    const float top = largest<float>(most);
    if (!finite || (top != 0 && !(1e-30f < top && top < 1e30f))) return false;
    constexpr int32_t kMost = (1 << (8 * kBytes - 1)) - 2;  // to which the largest is rounded, or to the next one
    units_.row(0)[row] = top / kMost;
    const float per_unit = top == 0 ? 0 : kMost / top;
    for (int64_t c = 0; c < p_.in_features; c += kLanes<float>) {
      const Vec<float> x = load(from + c, p_.in_features - c) * per_unit;
      // The addition rounds to nearest, and leaves the number in the last bits.
      Words number;
      if constexpr (kBytes == 2) {
        number = reinterpret_cast<Words>(x + 0x1.8p23f) - 0x4B400000u + 0x8000u;
      } else {
        number = reinterpret_cast<Words>(_mm512_maskz_cvtps_epi32(0xFFFF, reinterpret_cast<__m512>(x))) + 0x800000u;
      }
      FASTLM_UNROLL for (int n = 0; n < kBytes; ++n) {
        const __m512i byte = reinterpret_cast<__m512i>(number >> (8 * (kBytes - 1 - n)));
        put(input_.at(row, c, n), _mm512_maskz_cvtepi32_epi8(0xFFFF, byte));
      }
    }
    return true;
  }

  template <int kRows, int kColumns>
  inline __attribute__((always_inline)) void multiply(int64_t row, int64_t column) const {
    constexpr int kRowSums = kRows * kBytes, kSums = kRowSums + 1;  // for each column, the last one the weight's own
    const int8_t* const weight = static_cast<const int8_t*>(p_.weight) + column * p_.weight_stride;
    const uint8_t* const x = input_.rows_from(row);
    Vec<int32_t> total[kColumns * kSums] = {};
    const auto step = [&](int64_t k, int64_t count) __attribute__((always_inline)) {
      __m512i w[kColumns];
      FASTLM_UNROLL for (int c = 0; c < kColumns; ++c) {
        w[c] = weights(weight + c * p_.weight_stride + k, count);
        fetch(weight + c * p_.weight_stride + k);
      }
      FASTLM_UNROLL for (int n = 0; n < kSums; ++n) {
        const __m512i one = n < kRowSums ? get<__m512i>(x + k * kRowSums + n * kStep) : _mm512_set1_epi8(1);
        FASTLM_UNROLL for (int c = 0; c < kColumns; ++c) {
          Vec<int32_t>& sum = total[c * kSums + n];
          sum = reinterpret_cast<Vec<int32_t>>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), one, w[c]));
        }
      }
    };
    int64_t k = 0;
    for (; k + kStep <= p_.in_features; k += kStep) step(k, kStep);
    if (k < p_.in_features) step(k, p_.in_features - k);
    Vec<float> products[kRows * kColumns];
    FASTLM_UNROLL for (int c = 0; c < kColumns; ++c) {
      const Vec<int32_t>* const of_column = total + c * kSums;
      FASTLM_UNROLL for (int r = 0; r < kRows; ++r) {
        Vec<float>& product = products[r * kColumns + c];
        product = to_floats(of_column[r * kBytes] - (of_column[kRowSums] << 7));
        FASTLM_UNROLL for (int n = 1; n < kBytes; ++n) {
          product = fastlm::multiply_add(product, broadcast<float>(256), to_floats(of_column[r * kBytes + n]));
        }
      }
    }
    float y[kRows * kColumns + kLanes<float>];
    sum_each<float, kRows * kColumns>(products, y);
    FASTLM_UNROLL for (int r = 0; r < kRows; ++r) {
      finish<T, kColumns, float>(p_, row + r, column, load(y + r * kColumns) * units_.row(0)[row + r]);
    }
  }

  static Vec<float> to_floats(Vec<int32_t> x) {
    return reinterpret_cast<Vec<float>>(_mm512_maskz_cvtepi32_ps(0xFFFF, reinterpret_cast<__m512i>(x)));
  }

  static __m512i weights(const int8_t* from, int64_t count) {
    if (count >= kStep) return get<__m512i>(from);
    __m512i bytes = {};
    memcpy(&bytes, from, count);
    return bytes;
  }

  const LinearFwdParams& p_;
  Input<uint8_t, kMaxRows> input_;
  Workspace<float> units_;
  bool serves_ = false;
};
#endif

template <typename T, typename W>
const char* linear_fwd(const LinearFwdParams& p) {
#if defined(__AVX512VNNI__)
  if constexpr (std::is_same<W, int8_t>::value) {
    const MultiplyBytes<T, std::is_same<T, float>::value ? 3 : 2> bytes(p);
    if (bytes.failed()) return "out of memory";
    if (bytes.serves()) return run_all(p, p.rows.count(), bytes);
  }
#endif
  const Multiply<T, W> floats(p);
  return floats.failed() ? "out of memory" : run_all(p, p.rows.count(), floats);
}

}  // namespace

namespace FASTLM_CPU_TARGET {

const char* linear_fwd_cpu(const LinearFwdParams& p) {
  const bool int8 = p.weight_scale != nullptr;
  switch (p.dtype) {
    case DType::kFloat64:
      return int8 ? "does not serve int8 with float64" : linear_fwd<double, double>(p);
    case DType::kFloat32:
      return int8 ? linear_fwd<float, int8_t>(p) : linear_fwd<float, float>(p);
    case DType::kBFloat16:
      return int8 ? linear_fwd<BFloat16, int8_t>(p) : linear_fwd<BFloat16, BFloat16>(p);
    case DType::kFloat16:
      return int8 ? linear_fwd<Half, int8_t>(p) : linear_fwd<Half, Half>(p);
  }
  return "does not serve this dtype";
}

}  // namespace FASTLM_CPU_TARGET

#if FASTLM_CPU_BASELINE
FASTLM_CPU_DISPATCH(linear_fwd_cpu, LinearFwdParams)
#endif

}  // namespace fastlm
