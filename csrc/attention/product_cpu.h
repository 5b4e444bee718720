// Products of matrices on the CPU, c (rows, columns) += a (rows, steps) b (steps, columns), and the layouts that they
// take. A matrix to be multiplied consists of 32-bit words: floats, or, with the instruction for their dot products,
// pairs of bf16 along the dimension that is summed over. What is one word of `a`, broadcast, goes with a row of words
// of `b`, so that one kernel serves both and no layout but these is needed:
//
//   natural     a row of words for each row of the tensor: the first factor of what sums along its columns
//   paired      a word for each column, a row for each step: the second factor of what sums along its rows; for floats
//               it is the same as natural
//   transposed  a word for each of kTile rows, a row for each step: the second factor of what sums along its columns
//
// The kernel holds up to kStrip rows and kVectors vectors of c in registers, or, where the processor has tiles (AMX),
// 32 rows and columns. Each element is summed in the order of its steps, in one register or a sum of such sums, so that
// it does not depend on what else is computed.
#pragma once

#include <utility>

#include "common/simd.h"

namespace fastlm {
namespace {

constexpr int kLane = kLanes<float>;
constexpr int kVectors = kVectorBytes == 64 ? 4 : 2;  // as many as registers hold beside those of a and b
constexpr int kTile = 64;                             // keys

// What words are.
struct Floats {
  static constexpr int kPer = 1;               // elements to a word
  static constexpr int kStrip = 6, kRows = 1;  // rows that are multiplied at a time: at most, and a multiple of this
  using Element = float;

  static Vec<float> multiply_add(Words a, Words b, Vec<float> c) {
    return fastlm::multiply_add(reinterpret_cast<Vec<float>>(a), reinterpret_cast<Vec<float>>(b), c);
  }
};

#if defined(__AVX512BF16__)
struct Pairs {
  static constexpr int kPer = 2;
  static constexpr int kStrip = 6, kRows = 1;
  using Element = BFloat16;

  static Vec<float> multiply_add(Words a, Words b, Vec<float> c) {
    return reinterpret_cast<Vec<float>>(
        _mm512_dpbf16_ps(reinterpret_cast<__m512>(c), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
  }
};
#endif

#if defined(__AMX_BF16__)
// The same words, multiplied as tiles.
struct Tiled {
  static constexpr int kPer = 2;
  static constexpr int kStrip = 32, kRows = 16;
  using Element = BFloat16;
};
#endif

// In which words elements of T are multiplied.
template <typename T>
struct WordsOf {
  using type = Floats;
};
#if defined(__AMX_BF16__)
template <>
struct WordsOf<BFloat16> {
  using type = Tiled;
};
#elif defined(__AVX512BF16__)
template <>
struct WordsOf<BFloat16> {
  using type = Pairs;
};
#endif

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Steps of a sum over so many elements: tiles take sixteen at a time, beyond the last of which there are zeros.
template <typename K>
int64_t steps_of(int64_t elements) {
  return round_up((elements + K::kPer - 1) / K::kPer, K::kRows);
}

// Words in a row, of `cols` elements.
template <typename K>
int64_t natural_words(int64_t cols) {
  return round_up((cols + K::kPer - 1) / K::kPer, kLane);
}
inline int64_t paired_words(int64_t cols) { return round_up(cols, kLane); }

// Columns that are computed where there are `cols`.
template <typename K>
int wide(int cols) {
  return static_cast<int>(round_up(cols, K::kRows > 1 ? 2 * kLane : kLane));
}

// Products ----------------------------------------------------------------------------------------------------------

struct First {
  const uint32_t* at;
  int64_t row;  // words from one to the next
};
struct Second {
  const uint32_t* at;
  int64_t row;
};
struct Accumulators {
  float* at;
  int64_t row;
  bool fresh;  // what is there is not added to
};

// Vectors of c.
template <int kRows, int kColumns>
using Registers = Vec<float>[kRows][kColumns];

template <int kColumns>
inline __attribute__((always_inline)) void load_row(const float* from, Vec<float> (&to)[kColumns]) {
  FASTLM_UNROLL for (int n = 0; n < kColumns; ++n) to[n] = load(from + n * kLane);
}
template <int kColumns, typename T>
inline __attribute__((always_inline)) void store_row(const Vec<float> (&from)[kColumns], T* to) {
  FASTLM_UNROLL for (int n = 0; n + 1 < kColumns; n += 2) store_two(to + n * kLane, from[n], from[n + 1]);
  if (kColumns % 2 == 1) store(to + (kColumns - 1) * kLane, from[kColumns - 1]);
}

// c = a b
template <typename K, int kRows, int kColumns>
inline __attribute__((always_inline)) void product(const First& a, const Second& b, int64_t steps,
                                                   Registers<kRows, kColumns>& c) {
  FASTLM_UNROLL for (int r = 0; r < kRows; ++r) {
    FASTLM_UNROLL for (int n = 0; n < kColumns; ++n) c[r][n] = Vec<float>{};
  }
  const int64_t a_row = a.row, b_row = b.row;
  const uint32_t *left = a.at, *right = b.at;
  for (int64_t step = 0; step < steps; ++step, ++left, right += b_row) {
    Words row[kColumns];
    FASTLM_UNROLL for (int n = 0; n < kColumns; ++n) row[n] = get<Words>(right + n * kLane);
    FASTLM_UNROLL for (int r = 0; r < kRows; ++r) {
      const Words word = broadcast<uint32_t>(left[r * a_row]);
      FASTLM_UNROLL for (int n = 0; n < kColumns; ++n) c[r][n] = K::multiply_add(word, row[n], c[r][n]);
    }
  }
}

template <typename K, int kRows, int kColumns>
__attribute__((noinline)) void multiply(const Accumulators& c, const First& a, const Second& b, int64_t steps) {
  Registers<kRows, kColumns> sums;
  product<K>(a, b, steps, sums);
  float* to = c.at;
  const int64_t row = c.row;
  if (!c.fresh) {
    FASTLM_UNROLL for (int r = 0; r < kRows; ++r) {
      FASTLM_UNROLL for (int n = 0; n < kColumns; ++n) sums[r][n] += load(to + r * row + n * kLane);
    }
  }
  FASTLM_UNROLL for (int r = 0; r < kRows; ++r, to += row) {
    FASTLM_UNROLL for (int n = 0; n < kColumns; ++n) store(to + n * kLane, sums[r][n]);
  }
}

using Multiply = void (*)(const Accumulators&, const First&, const Second&, int64_t);

template <typename K, int kRows>
Multiply multiply_of(int64_t vectors) {
  if constexpr (kVectors == 4) {
    if (vectors == 4) return multiply<K, kRows, 4>;
    if (vectors == 3) return multiply<K, kRows, 3>;
  }
  return vectors == 2 ? multiply<K, kRows, 2> : multiply<K, kRows, 1>;
}

// Rows that are multiplied at a time, of those that are left.
template <typename K>
int strip_of(int64_t rows) {
  if (K::kRows > 1) return rows > K::kRows ? 2 * K::kRows : K::kRows;
  return rows >= K::kStrip ? K::kStrip : rows >= 4 ? 4 : rows >= 2 ? 2 : 1;
}

#if defined(__AMX_BF16__)
// A thread's tiles: all of 16 rows of 64 bytes.
struct TileConfig {
  TileConfig() {
    alignas(64) uint8_t config[64] = {1};
    for (int tile = 0; tile < 8; ++tile) config[16 + 2 * tile] = 64, config[48 + tile] = 16;
    _tile_loadconfig(config);
  }
  ~TileConfig() { _tile_release(); }
};

// kRows x kColumns tiles of c; steps in sixteens.
template <int kRows, int kColumns>
__attribute__((noinline)) void multiply_tiles(const Accumulators& c, const First& a, const Second& b, int64_t steps) {
  const auto at = [&](int row, int column) { return c.at + row * 16 * c.row + column * 16; };
  const int64_t c_bytes = c.row * 4, a_bytes = a.row * 4, b_bytes = b.row * 4;
  if (c.fresh) {
    _tile_zero(0);
    if (kColumns > 1) _tile_zero(1);
    if (kRows > 1) _tile_zero(2);
    if (kRows > 1 && kColumns > 1) _tile_zero(3);
  } else {
    _tile_loadd(0, at(0, 0), c_bytes);
    if (kColumns > 1) _tile_loadd(1, at(0, 1), c_bytes);
    if (kRows > 1) _tile_loadd(2, at(1, 0), c_bytes);
    if (kRows > 1 && kColumns > 1) _tile_loadd(3, at(1, 1), c_bytes);
  }
  for (int64_t step = 0; step < steps; step += 16) {
    _tile_loadd(4, a.at + step, a_bytes);
    _tile_loadd(6, b.at + step * b.row, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if (kColumns > 1) {
      _tile_loadd(7, b.at + step * b.row + 16, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (kRows > 1) {
      _tile_loadd(5, a.at + step + 16 * a.row, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if (kColumns > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, at(0, 0), c_bytes);
  if (kColumns > 1) _tile_stored(1, at(0, 1), c_bytes);
  if (kRows > 1) _tile_stored(2, at(1, 0), c_bytes);
  if (kRows > 1 && kColumns > 1) _tile_stored(3, at(1, 1), c_bytes);
}
#else
struct TileConfig {
  TileConfig() {}
};
#endif

// As many elements are summed one after the other, in steps. With more of them rounding would add up: their sums are
// summed. Without fused multiply-add there is twice as much of it.
template <typename K>
constexpr int64_t kChain = (kVectorBytes > 16 ? 128 : 64) / K::kPer;

// Whether registers hold a strip of c as wide as a tile.
template <typename K>
constexpr bool kInRegisters = K::kRows == 1 && kVectors * kLane == kTile;

// All of c; `columns` is a multiple of kLane.
template <typename K>
void multiply_all(int64_t rows, int64_t columns, Accumulators c, First a, Second b, int64_t steps) {
#if defined(__AMX_BF16__)
  if constexpr (K::kRows == 16) {
    for (int strip; rows > 0; rows -= strip, c.at += strip * c.row, a.at += strip * a.row) {
      strip = strip_of<K>(rows);
      for (int64_t at = 0; at < columns; at += 32) {
        (strip == 32 ? (columns - at > 16 ? multiply_tiles<2, 2> : multiply_tiles<2, 1>)
                     : (columns - at > 16 ? multiply_tiles<1, 2> : multiply_tiles<1, 1>))({c.at + at, c.row, c.fresh},
                                                                                          a, {b.at + at, b.row}, steps);
      }
    }
    return;
  } else
#endif
  {
    constexpr int64_t kSteps = kChain<K>;
    if (steps > kSteps) {
      multiply_all<K>(rows, columns, c, a, b, kSteps);
      c.fresh = false;
      return multiply_all<K>(rows, columns, c, {a.at + kSteps, a.row}, {b.at + kSteps * b.row, b.row}, steps - kSteps);
    }
    for (int strip; rows > 0; rows -= strip, c.at += strip * c.row, a.at += strip * a.row) {
      strip = strip_of<K>(rows);
      for (int64_t at = 0, vectors; at < columns; at += vectors * kLane) {
        vectors = columns - at >= kVectors * kLane ? kVectors : (columns - at) / kLane;
        (strip == 6   ? multiply_of<K, 6>(vectors)
         : strip == 4 ? multiply_of<K, 4>(vectors)
         : strip == 2 ? multiply_of<K, 2>(vectors)
                      : multiply_of<K, 1>(vectors))({c.at + at, c.row, c.fresh}, a, {b.at + at, b.row}, steps);
      }
    }
  }
}

// Of two tiles of transposed words the products of each row with its own, in the order of sums of multiply_all: what it
// gives for two rows is the same to the last bit.
template <typename K>
void multiply_rows(const uint32_t* a, const uint32_t* b, int64_t steps, float* c) {
  for (int at = 0; at < kTile; at += kLane) {
    Vec<float> total = {};
    for (int64_t step = 0; step < steps;) {
      Vec<float> sum = {};
      for (const int64_t stop = step + kChain<K> < steps ? step + kChain<K> : steps; step < stop; ++step) {
        sum = K::multiply_add(get<Words>(a + step * kTile + at), get<Words>(b + step * kTile + at), sum);
      }
      total += sum;
    }
    store(c + at, total);
  }
}

// Layouts -----------------------------------------------------------------------------------------------------------

// A step of a transposition, and the ones after it: rows whose numbers differ in one bit exchange every lane in whose
// number that bit is not as in the row's.
template <int kDistance, int... kAt>
inline __attribute__((always_inline)) void exchange(Words (&rows)[kLane], std::integer_sequence<int, kAt...> lanes) {
  if constexpr (kDistance < kLane) {
    FASTLM_UNROLL for (int i = 0; i < kLane; ++i) {
      if (i & kDistance) continue;
      const Words a = rows[i], b = rows[i + kDistance];
#if defined(__clang__)
      rows[i] = __builtin_shufflevector(a, b, (kAt & kDistance ? kLane + kAt - kDistance : kAt)...);
      rows[i + kDistance] = __builtin_shufflevector(a, b, (kAt & kDistance ? kLane + kAt : kAt + kDistance)...);
#else
      rows[i] = __builtin_shuffle(a, b, Words{(kAt & kDistance ? kLane + kAt - kDistance : kAt)...});
      rows[i + kDistance] = __builtin_shuffle(a, b, Words{(kAt & kDistance ? kLane + kAt : kAt + kDistance)...});
#endif
    }
    exchange<kDistance * 2>(rows, lanes);
  }
}

// kLane x kLane words.
inline __attribute__((always_inline)) void transpose(const uint32_t* from, int64_t from_row, uint32_t* to,
                                                     int64_t to_row) {
  Words rows[kLane];
  FASTLM_UNROLL for (int i = 0; i < kLane; ++i) rows[i] = get<Words>(from + i * from_row);
  exchange<1>(rows, std::make_integer_sequence<int, kLane>());
  FASTLM_UNROLL for (int i = 0; i < kLane; ++i) put(to + i * to_row, rows[i]);
}

// Rows [first, first + count) of a tensor, each one run of `cols` elements; `row` elements from one to the next.
template <typename T>
struct RowsOf {
  const T* at;
  int64_t row;
  int64_t cols;
};

// Natural words of `count` rows; zeros beyond a row's last element and for rows up to `all`.
template <typename K, typename T>
void pack_natural(const RowsOf<T>& from, int64_t count, int64_t all, uint32_t* to) {
  using Element = typename K::Element;
  const int64_t words = natural_words<K>(from.cols);
  for (int64_t r = 0; r < count; ++r, to += words) {
    const T* const source = from.at + r * from.row;
    if constexpr (sizeof(T) == sizeof(Element)) {
      constexpr int kPer = kLane * K::kPer;
      int64_t c = 0;
      for (; c + kPer <= from.cols; c += kPer) put(to + c / K::kPer, get<Words>(source + c));
      if (c == from.cols) continue;
      Words last = {};
      memcpy(&last, source + c, (from.cols - c) * sizeof(T));
      put(to + c / K::kPer, last);
    } else {
      Element* const row = reinterpret_cast<Element*>(to);
      for (int64_t c = 0; c < words * K::kPer; c += kLane)
        store(row + c, load(source + c, from.cols - c > 0 ? from.cols - c : 0));
    }
  }
  memset(to, 0, (all - count) * words * sizeof(uint32_t));
}

// (rows, words) transposed, both multiples of kLane.
inline void transpose_rows(const First& from, int64_t rows, int64_t words, uint32_t* to) {
  for (int64_t word = 0; word < words; word += kLane) {
    for (int64_t first = 0; first < rows; first += kLane) {
      transpose(from.at + first * from.row + word, from.row, to + word * rows + first, rows);
    }
  }
}

// Natural words of `count` rows, up to `all`: where they lie if they can be taken from there, else in `space`.
template <typename K, typename T>
First natural_rows(const RowsOf<T>& from, int64_t count, int64_t all, uint32_t* space) {
  const bool words = sizeof(T) == sizeof(typename K::Element) && reinterpret_cast<uintptr_t>(from.at) % 4 == 0 &&
                     from.row % K::kPer == 0 && from.cols % (kLane * K::kPer) == 0;
  if (words && count == all) return {reinterpret_cast<const uint32_t*>(from.at), from.row / K::kPer};
  pack_natural<K>(from, count, all, space);
  return {space, natural_words<K>(from.cols)};
}

// An even number of rows of natural words of pairs, of `cols` elements, as paired ones.
inline void pair_rows(const First& natural, int64_t rows, int64_t cols, uint32_t* to) {
  for (int64_t r = 0; r < rows; r += 2) {
    const uint16_t* const low = reinterpret_cast<const uint16_t*>(natural.at + r * natural.row);
    const uint16_t* const high = low + natural.row * 2;
    for (int64_t c = 0; c < paired_words(cols); c += kLane, to += kLane) {
      put(to, widen(get<HalfWords>(low + c)) | widen(get<HalfWords>(high + c)) << 16);
    }
  }
}

// Lays a tile of rows out as paired words and, where that is asked for, as transposed ones.
template <typename K, typename T>
void lay_out_rows(const RowsOf<T>& from, int64_t count, uint32_t* space, uint32_t* pairs, uint32_t* transposed) {
  First natural = {pairs, natural_words<K>(from.cols)};
  if constexpr (K::kPer == 1) {
    pack_natural<K>(from, count, kTile, pairs);
  } else {
    natural = natural_rows<K>(from, count, kTile, space);
    pair_rows(natural, kTile, from.cols, pairs);
  }
  if (transposed) transpose_rows(natural, kTile, natural_words<K>(from.cols), transposed);
}

template <typename T>
void write_row(const float* from, float factor, int64_t cols, T* to) {
  int64_t c = 0;
  for (; c + 2 * kLane <= cols; c += 2 * kLane)
    store_two(to + c, load(from + c) * factor, load(from + c + kLane) * factor);
  for (; c < cols; c += kLane) store(to + c, load(from + c) * factor, cols - c);
}

// Vectors of two rows as one of pairs.
inline Words paired(Vec<float> low, Vec<float> high) {
#if defined(__AVX512BF16__)
  alignas(64) constexpr uint16_t kOrder[] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                             8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both =
      reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(high), reinterpret_cast<__m512>(low)));
  return reinterpret_cast<Words>(_mm512_permutexvar_epi16(get<__m512i>(kOrder), both));
#else
  return widen(Pack<BFloat16>::bits(low)) | widen(Pack<BFloat16>::bits(high)) << 16;
#endif
}

}  // namespace
}  // namespace fastlm
