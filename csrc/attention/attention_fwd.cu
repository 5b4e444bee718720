// Forward of attention; equations in attention.h.
//
// A block has 128 queries of a head, in the registers of its warps, and walks over tiles of 64 keys that any of them
// sees: while a tile is multiplied the next one comes into the other buffer by cp.async, so that there is one barrier
// to a tile. Scores stay in registers and become, as they are, the first factor of the product with the values. Only
// tiles at an edge (the diagonal, a window's end, the last keys) compare places.
//
// Decoding: where a sequence has few queries, the rows of a block are the queries of all heads that share a key head,
// so that keys are read once; and keys are split among blocks, each of which leaves an output and a log-sum-exp of its
// own, which a second kernel adds in order. Into how many parts does not depend on the GPU.
//
// Bytes of global memory for a head of T queries and keys of D elements: 4TD + 4TD * ceil(T / 128), the second part
// mostly from L2 and half of it where causal; 4T for the log-sum-exp.
#include <algorithm>
#include <cfloat>
#include <limits>

#include "attention/dropout.cuh"
#include "attention/product.cuh"
#include "attention/scores.cuh"
#include "attention/sequence.h"
#include "attention/softmax.cuh"
#include "common/kernel_attributes.h"

namespace fastlm {
namespace {

constexpr int kRows = 128;  // of a block
constexpr int kKeys = 64;   // of a tile

template <int kWidth>
struct Shape {
  static constexpr int kRowTiles = kWidth <= 64 ? 2 : 1;  // of 16 rows, of a warp: as many as its registers hold
  static constexpr int kThreads = kRows / kRowTiles * 2;
  static constexpr int kTileBytes = kKeys * kWidth * 2;
  static constexpr int kSharedBytes = 4 * kTileBytes;  // two buffers of keys and values; queries and output need one
  static_assert(kRows * kWidth * 2 == 2 * kTileBytes, "queries fit a buffer");
  static_assert(kSharedBytes <= kSharedWithOptIn, "for every GPU");
};

struct Fwd {
  AttentionFwdParams p;
  Scores scores;
  Dropout dropout;
  int tiles;  // of rows, of the longest sequence
};

// The rows of a block: queries of one head, or of all heads that share a key head.
struct BlockRows {
  int first, count;  // of the block's first among the sequence's, and how many those are
  int head;          // of the sequence's first row
  int queries;
  bool grouped;

  __device__ bool exists(int row) const { return first + row < count; }
  __device__ int query(int row) const { return grouped ? (first + row) % queries : first + row; }
  __device__ int head_of(int row) const { return grouped ? head + (first + row) / queries : head; }
};

// What is not a product: all that makes scores of them but the scale, if that is all there is.
template <int M, int N>
__device__ void finish_scores(const Fwd& f, const Sequence& sequence, const BlockRows& rows, float (&s)[M][N][4],
                              int first_row, int first_key, bool edge, int lane) {
  int query[M][2];
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) query[m][half] = rows.query(first_row + m * 16 + half * 8 + lane / 4);
  }
  const auto key = [&](int n, int e) { return first_key + n * 8 + lane % 4 * 2 + e % 2; };
  if (f.scores.capped()) {
    float unused;
    for_each_element<M, N>([&](int m, int n, int e) { s[m][n][e] = f.scores.cap(s[m][n][e], unused); });
  } else if (f.scores.general()) {
    for_each_element<M, N>([&](int m, int n, int e) { s[m][n][e] = f.scores.scaled(s[m][n][e]); });
  }
  if (f.scores.biased()) {
    float slope[M][2];
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first_row + m * 16 + half * 8 + lane / 4, of_none = rows.head;
        slope[m][half] = f.scores.slope(sequence.number * f.p.heads + (rows.exists(row) ? rows.head_of(row) : of_none));
      }
    }
    for_each_element<M, N>([&](int m, int n, int e) {
      s[m][n][e] = Scores::bias(s[m][n][e], slope[m][e / 2], query[m][e / 2] + sequence.offset - key(n, e));
    });
  }
  if (edge) {
    for_each_element<M, N>([&](int m, int n, int e) {
      if (!sequence.sees(query[m][e / 2], key(n, e))) s[m][n][e] = -INFINITY;
    });
  }
}

template <int M, int K>
__device__ void drop_all(const Fwd& f, const Sequence& sequence, const BlockRows& rows, uint32_t (&p)[M][K][4],
                         int first_row, int first_key, int lane) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
    int64_t number[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + m * 16 + half * 8 + lane / 4;
      number[half] = sequence.row(f.p, rows.head_of(row)) + rows.query(row);
    }
#pragma unroll
    for (int n = 0; n < 2 * K; ++n) {
      const uint32_t kept = kept_of_rows(f.dropout, f.p.rng_state, number[0], number[1], first_key + n * 8, lane);
      uint32_t (&a)[4] = p[m][n / 2];
      a[n % 2 * 2] = drop(a[n % 2 * 2], kept);
      a[n % 2 * 2 + 1] = drop(a[n % 2 * 2 + 1], kept >> 2);
    }
  }
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(Shape<kWidth>::kThreads, kWidth <= 64 ? 2 : 1)
    attention_fwd_kernel(const __grid_constant__ Fwd f) {
  if (!kAtLeastSm80) return device_assert(false, "attention needs compute capability 8.0");
  constexpr int M = Shape<kWidth>::kRowTiles, kThreads = Shape<kWidth>::kThreads;
  constexpr int kTileBytes = Shape<kWidth>::kTileBytes;
  FASTLM_DYNAMIC_SHARED(unsigned char, shared);
  const AttentionFwdParams& p = f.p;
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * M * 16;

  const int heads = p.grouped ? p.kv_heads : p.heads, group = p.heads / p.kv_heads;
  const int tile = f.tiles - 1 - static_cast<int>(blockIdx.x % f.tiles);  // the longest first, where causal
  const int head = blockIdx.x / f.tiles % heads;
  const Sequence sequence(p, blockIdx.x / f.tiles / heads);
  const int kv_head = p.grouped ? head : head / group;
  const BlockRows rows = {tile * kRows, p.grouped ? group * sequence.queries : sequence.queries,
                          p.grouped ? head * group : head, sequence.queries, p.grouped};
  if (!rows.exists(0)) return;
  const int first_query = p.grouped ? 0 : rows.first;
  const int last_query = p.grouped ? sequence.queries - 1 : rows.first + kRows - 1;

  const T* const query = static_cast<const T*>(p.query);
  Tiles keys = sequence.seen_by(first_query, last_query, kKeys);
  const Tiles whole = sequence.all_seen_by(first_query, last_query, kKeys);
  const Tiles plain = f.scores.general() ? Tiles{0, 0} : whole;  // where scores are products, times the scale
  const int part = (keys.stop - keys.start + p.splits - 1) / p.splits;
  keys.start += blockIdx.y * part;
  keys.stop = min(keys.stop, keys.start + part);
  using Source = Rows16<kWidth, kThreads>;
  Source key(sequence.key_rows(static_cast<const T*>(p.key), p.key_strides, kv_head), p.key_strides.at[2],
             keys.start * kKeys, sequence.keys, p.head_dim);
  Source value(sequence.key_rows(static_cast<const T*>(p.value), p.value_strides, kv_head), p.value_strides.at[2],
               keys.start * kKeys, sequence.keys, p.value_dim);
  const auto fill = [&](unsigned char* tile) {
    key.template copy<kKeys>(tile);
    value.template copy<kKeys>(tile + kTileBytes);
    cp_async_commit();
  };
  int now = 0;  // where in shared memory this tile's keys are, and the values after them
  Tile<kWidth>::template copy<kRows, kThreads>(
      shared + 2 * kTileBytes,
      [&](int row) {
        return sequence.query_rows(query, p.query_strides, rows.head_of(row)) + rows.query(row) * p.query_strides.at[2];
      },
      rows.count - rows.first, p.head_dim, query);
  cp_async_commit();
  if (keys.start < keys.stop) fill(shared);
  cp_async_wait<0>();
  __syncthreads();
  uint32_t q[M][kWidth / 16][4];
  load_rows<kWidth>(q, shared, 2 * kTileBytes + warp_row * kWidth * 2 + Tile<kWidth>::down(lane));

  float output[M][kWidth / 8][4];
  set(output, 0.0f);
  Softmax<T, M> softmax;
  for (int t = keys.start; t < keys.stop; ++t) {
    cp_async_wait<0>();
    __syncthreads();  // all see this tile, and none reads any more what lies where the next one goes
    if (t + 1 < keys.stop) fill(shared + (2 * kTileBytes - now));
    if (rows.exists(warp_row)) {
      const int first_key = t * kKeys;
      float s[M][kKeys / 8][4];
      uint32_t a[M][kKeys / 16][4];
      set(s, 0.0f);
      multiply_rows<T, kWidth>(s, from_registers(q), shared, now + Tile<kWidth>::along(lane));
      if (!plain.have(t)) {
        finish_scores(f, sequence, rows, s, warp_row, first_key, !whole.have(t), not_before(lane));
      }
      softmax(s, f.scores.unit, a, output);
      if (p.rng_state != nullptr) drop_all(f, sequence, rows, a, warp_row, first_key, not_before(lane));
      multiply_columns<T, kWidth, kKeys / 16>(output, from_registers(a), shared,
                                              now + kTileBytes + Tile<kWidth>::down(lane));
    }
    now = 2 * kTileBytes - now;
  }

  __syncthreads();
#pragma unroll
  for (int m = 0; m < M; ++m) {
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + m * 16 + half * 8 + lane / 4;
      float lse;
      const float total = softmax.finish(m, half, lse);
      factor[half] = total == 0.0f ? 0.0f : f.dropout.scale / total;
      if (!rows.exists(row)) continue;
      const int64_t number = sequence.row(p, rows.head_of(row)) + rows.query(row);
      const int64_t all = int64_t{p.batch} * p.heads * p.queries * blockIdx.y + number;
      if (lane % 4 == 0) (p.parts == nullptr ? p.lse : p.part_lse)[all] = lse;
      if (p.parts == nullptr) continue;
#pragma unroll
      for (int n = 0; n < kWidth / 8; ++n) {
        const float two[2] = {output[m][n][half * 2] * factor[half], output[m][n][half * 2 + 1] * factor[half]};
        const int column = n * 8 + lane % 4 * 2;
        if (column < p.value_dim) store<2>(p.parts + all * p.value_dim + column, two);
      }
    }
    store_rows<T, kWidth>(shared, Tile<kWidth>::element(warp_row + m * 16, lane), output[m], factor[0], factor[1]);
  }
  if (p.parts != nullptr) return;
  __syncthreads();
  T* const to = static_cast<T*>(p.output);
  Tile<kWidth>::template write<kRows, kThreads, T>(
      shared,
      [&](int row) {
        return sequence.query_rows(to, p.output_strides, rows.head_of(row)) + rows.query(row) * p.output_strides.at[2];
      },
      rows.count - rows.first, p.value_dim);
}

// Adds the outputs of parts of the keys, a warp to a row, weighted by what each part is of the whole.
constexpr int kCombineThreads = 128;

template <typename T>
__global__ void __launch_bounds__(kCombineThreads) attention_combine_kernel(const __grid_constant__ Fwd f) {
  const AttentionFwdParams& p = f.p;
  const int64_t rows = int64_t{p.batch} * p.heads * p.queries;
  const int64_t row = int64_t{blockIdx.x} * (kCombineThreads / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= rows) return;
  float top = -INFINITY, total = 0.0f;
  for (int split = 0; split < p.splits; ++split) top = fmaxf(top, p.part_lse[split * rows + row]);
  const float base = top == -INFINITY ? 0.0f : fminf(top, FLT_MAX);  // inf - inf is NaN
  const auto weight = [&](int split) { return exp2_approx((p.part_lse[split * rows + row] - base) * kLog2e); };
  for (int split = 0; split < p.splits; ++split) total += weight(split);
  const int i = row % p.queries, head = row / p.queries % p.heads;
  T* const output = static_cast<T*>(p.output) + row / p.queries / p.heads * p.output_strides.at[0] +
                    head * p.output_strides.at[1] + i * p.output_strides.at[2];
  for (int column = lane * 2; column < p.value_dim; column += 64) {
    float sum[2] = {0.0f, 0.0f};
    for (int split = 0; split < p.splits; ++split) {
      const float share = weight(split) / total;
      float two[2];
      load<2>(p.parts + (split * rows + row) * p.value_dim + column, two);
      sum[0] += share * two[0], sum[1] += share * two[1];
    }
    if (total == 0.0f) sum[0] = sum[1] = 0.0f;
    store<2>(output + column, sum);
  }
  if (lane == 0) p.lse[row] = base + logf(total);
}

template <typename T, int kWidth>
const char* start_fwd(const Fwd& f, int device, void* stream) {
  const AttentionFwdParams& p = f.p;
  const int64_t heads = p.grouped ? p.kv_heads : p.heads, blocks = f.tiles * heads * p.sequences;
  if (blocks > std::numeric_limits<int>::max()) return "more tiles of queries than a grid can have";
  const dim3 grid(static_cast<unsigned>(blocks), p.splits);
  const char* error = launch(attention_fwd_kernel<T, kWidth>, grid, Shape<kWidth>::kThreads, f, device, stream,
                             Shape<kWidth>::kSharedBytes);
  if (error != nullptr || p.parts == nullptr) return error;
  const int64_t rows = int64_t{p.batch} * p.heads * p.queries, per_block = kCombineThreads / 32;
  return launch(attention_combine_kernel<T>, static_cast<unsigned>((rows + per_block - 1) / per_block), kCombineThreads,
                f, device, stream);
}

template <typename T>
const char* start_fwd(const Fwd& f, int device, void* stream) {
  const int width = std::max(f.p.head_dim, f.p.value_dim);
  if (width <= 32) return start_fwd<T, 32>(f, device, stream);
  if (width <= 64) return start_fwd<T, 64>(f, device, stream);
  if (width <= 96) return start_fwd<T, 96>(f, device, stream);
  if (width <= 128) return start_fwd<T, 128>(f, device, stream);
  return "head dimensions go up to 128";
}

template <typename T, int kWidth>
void register_width() {
  const std::string type = std::string("<") + kTypeName<T> + ", " + std::to_string(kWidth) + ">";
  register_kernel("attention_fwd" + type, attention_fwd_kernel<T, kWidth>, Shape<kWidth>::kThreads,
                  Shape<kWidth>::kSharedBytes);
}

template <typename T>
void register_kernels() {
  register_width<T, 32>();
  register_width<T, 64>();
  register_width<T, 96>();
  register_width<T, 128>();
  register_kernel(std::string("attention_combine<") + kTypeName<T> + ">", attention_combine_kernel<T>, kCombineThreads);
}

const bool registered = [] {
  register_kernels<__nv_bfloat16>();
  register_kernels<__half>();
  return true;
}();

}  // namespace

const char* attention_fwd(const AttentionFwdParams& p, int device, void* stream) {
  const int rows = p.grouped ? p.max_queries * (p.heads / p.kv_heads) : p.max_queries;
  const Fwd f = {p, Scores(p), Dropout(p.dropout_p), (rows + kRows - 1) / kRows};
  if (p.dtype == DType::kBFloat16) return start_fwd<__nv_bfloat16>(f, device, stream);
  if (p.dtype == DType::kFloat16) return start_fwd<__half>(f, device, stream);
  return "attention is of bf16 and fp16";
}

}  // namespace fastlm
