// Vectors of the CPU kernels, as wide as the instruction set that the file is compiled for: 64 bytes with AVX-512, 32
// with AVX2, 16 otherwise. Arithmetic is the compiler's own (vector extensions of GCC and Clang); here are loads and
// stores that convert, and sums in a fixed order. A is the type of the arithmetic: float, or double for double.
//
// Everything has internal linkage: the linker must never take a function of one variant for another's. (AVX-512
// conversions are the forms with a mask: the plain ones make GCC 12 warn of its own header.)
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__clang__)
#define FASTLM_UNROLL _Pragma("unroll")
#else
#define FASTLM_UNROLL _Pragma("GCC unroll 32")
#endif

namespace fastlm {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename A>
struct VecOf {
  typedef A type __attribute__((vector_size(kVectorBytes)));
};
template <typename A>
using Vec = typename VecOf<A>::type;
template <typename A>
constexpr int kLanes = kVectorBytes / sizeof(A);

using Words = Vec<uint32_t>;
typedef uint16_t HalfWords __attribute__((vector_size(kVectorBytes / 2)));

template <typename T>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};

// Vectors -----------------------------------------------------------------------------------------------------------

template <typename A>
inline Vec<A> broadcast(A value) {
  return value - Vec<A>{};
}

// a * b + c, rounded once where the instruction set can.
inline Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec<float>>(
      _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__FMA__)
  return reinterpret_cast<Vec<float>>(
      _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#else
  return a * b + c;
#endif
}
inline Vec<double> multiply_add(Vec<double> a, Vec<double> b, Vec<double> c) { return a * b + c; }

// A vector in memory, at any address.
template <typename V>
inline V get(const void* p) {
  typedef V Unaligned __attribute__((aligned(1), may_alias));
  return *static_cast<const Unaligned*>(p);
}
template <typename V>
inline void put(void* p, V x) {
  typedef V Unaligned __attribute__((aligned(1), may_alias));
  *static_cast<Unaligned*>(p) = x;
}

// 16-bit words as 32-bit ones and back, the high half dropped. (GCC makes four instructions of
// __builtin_convertvector.)
inline Words widen(HalfWords x) {
#if defined(__AVX512F__)
  return reinterpret_cast<Words>(_mm512_maskz_cvtepu16_epi32(0xFFFF, reinterpret_cast<__m256i>(x)));
#elif defined(__AVX2__)
  return reinterpret_cast<Words>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(x)));
#else
  return __builtin_convertvector(x, Words);
#endif
}
inline HalfWords narrow(Words x) {
#if defined(__AVX512F__)
  return reinterpret_cast<HalfWords>(_mm512_maskz_cvtepi32_epi16(0xFFFF, reinterpret_cast<__m512i>(x)));
#else
  return __builtin_convertvector(x, HalfWords);
#endif
}

inline Vec<float> load(const float* p) { return get<Vec<float>>(p); }
inline Vec<double> load(const double* p) { return get<Vec<double>>(p); }

inline Vec<float> load(const BFloat16* p) { return reinterpret_cast<Vec<float>>(widen(get<HalfWords>(p)) << 16); }

inline Vec<float> load(const Half* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec<float>>(_mm512_maskz_cvtph_ps(0xFFFF, get<__m256i>(p)));
#elif defined(__F16C__)
  return reinterpret_cast<Vec<float>>(_mm256_cvtph_ps(get<__m128i>(p)));
#else
  // The exponent moves by multiplication with 2^112, which also normalises subnormals; infinity and NaN are set apart.
  const Words half = widen(get<HalfWords>(p));
  const Words magnitude = (half & 0x7FFFu) << 13, sign = (half & 0x8000u) << 16;
  const Words finite = reinterpret_cast<Words>(reinterpret_cast<Vec<float>>(magnitude) * 0x1p112f);
  return reinterpret_cast<Vec<float>>(sign | (magnitude >= (0x7C00u << 13) ? magnitude | 0x7F800000u : finite));
#endif
}

inline Vec<float> load(const int8_t* p) {
#if defined(__AVX512F__)
  const __m512i wide = _mm512_maskz_cvtepi8_epi32(0xFFFF, get<__m128i>(p));
  return reinterpret_cast<Vec<float>>(_mm512_maskz_cvtepi32_ps(0xFFFF, wide));
#elif defined(__AVX2__)
  return reinterpret_cast<Vec<float>>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))));
#else
  typedef int8_t Bytes __attribute__((vector_size(kLanes<float>)));
  return __builtin_convertvector(get<Bytes>(p), Vec<float>);
#endif
}

// x as elements of T: rounded to nearest, ties to even. AVX-512-BF16 makes 0 of results below 2^-126, as its
// instruction does.
template <typename T>
struct Pack {
  static Vec<T> bits(Vec<T> x) { return x; }
};

template <>
struct Pack<BFloat16> {
  static HalfWords bits(Vec<float> x) {
#if defined(__AVX512BF16__)
    return reinterpret_cast<HalfWords>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(x)));
#else
    const Words bits = reinterpret_cast<Words>(x);
    const Words rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    const Words quiet = (bits >> 16) | 0x40u;  // a NaN must not round to infinity
    return narrow(x == x ? rounded : quiet);
#endif
  }
};

template <>
struct Pack<Half> {
  static HalfWords bits(Vec<float> x) {
#if defined(__AVX512F__)
    const __m512 wide = reinterpret_cast<__m512>(x);
    return reinterpret_cast<HalfWords>(_mm512_maskz_cvtps_ph(0xFFFF, wide, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    return reinterpret_cast<HalfWords>(_mm256_cvtps_ph(reinterpret_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
#else
    const Words bits = reinterpret_cast<Words>(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
    // A subnormal result is rounded by an addition whose unit in the last place is 2^-24.
    const Words normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
    const Words subnormal = reinterpret_cast<Words>(reinterpret_cast<Vec<float>>(magnitude) + 0.5f) - 0x3F000000u;
    const Words finite = magnitude < (113u << 23) ? subnormal : normal;
    const Words special = magnitude > 0x7F800000u ? Words{} + 0x7E00u : Words{} + 0x7C00u;
    return narrow((magnitude >= 0x477FF000u ? special : finite) | sign);
#endif
  }
};

template <typename T>
using Packed = decltype(Pack<T>::bits(Vec<typename Arithmetic<T>::type>{}));

template <typename T>
inline void store(T* p, Vec<typename Arithmetic<T>::type> x) {
  put(p, Pack<T>::bits(x));
}

// Two vectors, one after the other.
template <typename T>
inline void store_two(T* p, Vec<typename Arithmetic<T>::type> low, Vec<typename Arithmetic<T>::type> high) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same<T, BFloat16>::value) {
    const __m512 a = reinterpret_cast<__m512>(low), b = reinterpret_cast<__m512>(high);
    return put(p, reinterpret_cast<Words>(_mm512_cvtne2ps_pbh(b, a)));
  }
#endif
  store(p, low);
  store(p + kLanes<typename Arithmetic<T>::type>, high);
}

// A store past the caches, for what is larger than they are: it saves reading the lines that it fills. p is aligned to
// the packed vector. The thread ends with stream_end(), before others may look.
template <typename T>
inline void stream(T* p, Vec<typename Arithmetic<T>::type> x) {
  const Packed<T> bits = Pack<T>::bits(x);
#if defined(__AVX512F__)
  if constexpr (sizeof bits == 64) return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), get<__m512i>(&bits));
#endif
#if defined(__AVX2__)
  if constexpr (sizeof bits == 32) return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), get<__m256i>(&bits));
#endif
#if defined(__x86_64__)
  if constexpr (sizeof bits == 16) return _mm_stream_si128(reinterpret_cast<__m128i*>(p), get<__m128i>(&bits));
#endif
  put(p, bits);
}

inline void stream_end() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Sum of the lanes, halves first: the same order always.
template <typename A>
inline A sum(Vec<A> x) {
  A lanes[kLanes<A>];
  memcpy(lanes, &x, sizeof lanes);
  for (int width = kLanes<A> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

// Of a and b, one after the other, each block of so many lanes plus the block that follows it.
template <int kBlock, typename A, int... kAt>
inline Vec<A> add_blocks(Vec<A> a, Vec<A> b, std::integer_sequence<int, kAt...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (kAt + kAt / kBlock * kBlock)...) +
         __builtin_shufflevector(a, b, (kAt + kAt / kBlock * kBlock + kBlock)...);
#else
  using Lanes = Vec<std::conditional_t<sizeof(A) == 8, int64_t, int32_t>>;
  return __builtin_shuffle(a, b, Lanes{(kAt + kAt / kBlock * kBlock)...}) +
         __builtin_shuffle(a, b, Lanes{(kAt + kAt / kBlock * kBlock + kBlock)...});
#endif
}

// sum() of each of the vectors, of which there are as many as lanes, or fewer.
template <typename A, int kCount, int kBlock = kLanes<A> / 2>
inline __attribute__((always_inline)) Vec<A> sums(const Vec<A>* x) {
  static_assert(kCount <= 2 * kBlock, "one vector has a lane for each");
  constexpr int kLeft = (kCount + 1) / 2;
  Vec<A> left[kLeft];
  FASTLM_UNROLL for (int n = 0; n < kLeft; ++n) {
    const Vec<A>&a = x[2 * n], &b = x[2 * n + 1 < kCount ? 2 * n + 1 : 2 * n];
    left[n] = add_blocks<kBlock, A>(a, b, std::make_integer_sequence<int, kLanes<A>>());
  }
  if constexpr (kBlock == 1) {
    return left[0];
  } else {
    return sums<A, kLeft, kBlock / 2>(left);
  }
}

// The larger of each pair of lanes; of NaN and a number b's.
template <typename V>
inline V max(V a, V b) {
  return a > b ? a : b;
}

// Whether a comparison holds in any lane.
inline bool any(Vec<int32_t> lanes) {
#if defined(__AVX512DQ__)
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(lanes)) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(lanes)) != 0;
#elif defined(__x86_64__)
  return _mm_movemask_ps(reinterpret_cast<__m128>(lanes)) != 0;
#else
  int32_t all = 0;
  for (int i = 0; i < kLanes<int32_t>; ++i) all |= lanes[i];
  return all != 0;
#endif
}

template <typename A>
inline A largest(Vec<A> x) {
  A lanes[kLanes<A>], result;
  memcpy(lanes, &x, sizeof lanes);
  result = lanes[0];
  for (int i = 1; i < kLanes<A>; ++i) result = lanes[i] > result ? lanes[i] : result;
  return result;
}

// Functions ---------------------------------------------------------------------------------------------------------

// e^x within 2 ulp; 0 instead of subnormal numbers. With n = round(x / ln 2) and r = x - n ln 2 in two steps, 2^n times
// Cephes' polynomial of r.
inline Vec<float> exp(Vec<float> x) {
  constexpr float kLowest = -87.33654f, kBeyond = 88.8f;
  const Vec<float> clamped = x > kBeyond ? broadcast<float>(kBeyond) : x;
  const Vec<float> shifted = multiply_add(clamped, broadcast<float>(1.44269504f), broadcast<float>(0x1.8p23f));
  const Vec<float> n = shifted - 0x1.8p23f;
  Vec<float> r = multiply_add(n, broadcast<float>(-0.693359375f), clamped);
  r = multiply_add(n, broadcast<float>(2.12194440e-4f), r);
  Vec<float> y = broadcast<float>(1.9875691500e-4f);
  constexpr float kMore[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  for (const float c : kMore) {
    y = multiply_add(y, r, broadcast<float>(c));
  }
  y = multiply_add(y * r, r, r + 1.0f);
  const Words power = (reinterpret_cast<Words>(shifted) << 23) + 0x3F800000u;  // shifted ends in the bits of n
  y *= reinterpret_cast<Vec<float>>(power);
  return x < kLowest ? Vec<float>{} : y;
}

// 2^x for x up to 127, exactly 1 for 0; 0 instead of subnormal numbers. With n = round(x), 2^n times the polynomial of
// x - n whose largest relative error is least of those that are 1 at 0: within 1 ulp of degree 6, within 3e-6 of degree
// 4, which is next to nothing beside bf16's 4e-3.
template <int kDegree = 6>
inline Vec<float> exp2(Vec<float> x) {
  static_assert(kDegree == 6 || kDegree == 4, "there are coefficients for degrees 4 and 6");
  constexpr float kSix[] = {
      0x1.41fbbcp-13f, 0x1.5f3e54p-10f, 0x1.3b2d4cp-7f, 0x1.c6aee8p-5f, 0x1.ebfbdcp-3f, 0x1.62e430p-1f, 1.0f};
  constexpr float kFour[] = {0x1.3a02ccp-7f, 0x1.c9fc46p-5f, 0x1.ec0378p-3f, 0x1.62e12cp-1f, 1.0f};
  const float* const coefficients = kDegree == 6 ? kSix : kFour;
  const Vec<float> shifted = x + 0x1.8p23f;
  const Vec<float> r = x - (shifted - 0x1.8p23f);
  Vec<float> y = broadcast<float>(coefficients[0]);
  FASTLM_UNROLL for (int n = 1; n <= kDegree; ++n) y = multiply_add(y, r, broadcast<float>(coefficients[n]));
#if defined(__AVX512F__)
  y = reinterpret_cast<Vec<float>>(
      _mm512_maskz_scalef_ps(0xFFFF, reinterpret_cast<__m512>(y), reinterpret_cast<__m512>(shifted - 0x1.8p23f)));
#else
  y *= reinterpret_cast<Vec<float>>((reinterpret_cast<Words>(shifted) << 23) + 0x3F800000u);
#endif
  return x < -126.0f ? Vec<float>{} : y;
}

// tanh x within 4 ulp: Cephes' polynomial near 0, where 1 - 2 / (e^2x + 1) would lose digits.
inline Vec<float> tanh(Vec<float> x) {
  const Vec<float> magnitude = reinterpret_cast<Vec<float>>(reinterpret_cast<Words>(x) & 0x7FFFFFFFu);
  const Words sign = reinterpret_cast<Words>(x) & 0x80000000u;
  const Vec<float> far = 1.0f - 2.0f / (exp(magnitude + magnitude) + 1.0f);
  const Vec<float> square = x * x;
  Vec<float> near = broadcast<float>(-5.70498872745e-3f);
  constexpr float kMore[] = {2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f, -3.33332819422e-1f};
  for (const float c : kMore) {
    near = multiply_add(near, square, broadcast<float>(c));
  }
  near = multiply_add(near * square, x, x);
  return magnitude < 0.625f ? near : reinterpret_cast<Vec<float>>(reinterpret_cast<Words>(far) | sign);
}

inline Vec<double> exp(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}
inline Vec<double> tanh(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_tanh(x[i]);
  return x;
}

// Parts of a vector, for the last columns of a row ------------------------------------------------------------------

template <typename T>
inline auto load(const T* p, int64_t count) {
  constexpr int kLanesHere = kLanes<typename Arithmetic<T>::type>;
  if (count >= kLanesHere) return load(p);
  T padded[kLanesHere] = {};
  memcpy(padded, p, count * sizeof(T));
  return load(padded);
}

template <typename T>
inline void store(T* p, Vec<typename Arithmetic<T>::type> x, int64_t count) {
  if (count >= kLanes<typename Arithmetic<T>::type>) return store(p, x);
  const Packed<T> bits = Pack<T>::bits(x);
  memcpy(p, &bits, count * sizeof(T));
}

// x in the first `count` lanes, `rest` in the others.
template <typename A>
inline Vec<A> first(Vec<A> x, int64_t count, A rest = 0) {
  if (count >= kLanes<A>) return x;
  Vec<A> lanes = broadcast<A>(rest);
  memcpy(&lanes, &x, count * sizeof(A));
  return lanes;
}

}  // namespace
}  // namespace fastlm
