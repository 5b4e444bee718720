// Backward of attention; equations in attention.h.
//
// First a pass over rows leaves the log-sum-exp in units of log2, and delta, by the same products as the gradient of
// probabilities: so a row that looks at one key has a gradient of exactly 0, and not what two orders of adding leave.
// Then a block has tiles of 128 keys, with 16 keys to a warp, and walks over the tiles of queries that see any of them,
// of all heads that share the key head, which come by cp.async while others are multiplied. Scores and their gradient
// are formed with keys along the rows, so that they are, as they stand in registers, the first factors of the products
// for grad_value and grad_key, which stay in registers too. For grad_query the gradient of scores goes through shared
// memory.
//
// Deterministic: a block adds to a sum of its own of grad_query, in fp32, in the order of its keys; in the end these
// sums, of which there are as many as blocks to a key head, are added in order. A thread alone adds to what is its own:
// its sum comes from memory as an accumulator and goes back, without atomics or barriers. How many blocks there are
// does not depend on the GPU. Five products of matrices, as in the equations.
//
// Bytes of global memory for a head of T queries and keys of D elements: 4TD + 4TD * ceil(T / 128) and for the sums
// 8TD * ceil(T / 128), mostly in L2, half of both where causal; 4TD for the gradients of keys; 6TD for that of queries.
#include <algorithm>
#include <limits>

#include "attention/dropout.cuh"
#include "attention/product.cuh"
#include "attention/scores.cuh"
#include "attention/sequence.h"
#include "common/kernel_attributes.h"

namespace fastlm {
namespace {

constexpr int kKeys = 128;  // of a tile
constexpr int kThreads = 256;

template <int kWidth>
struct Shape {
  static constexpr int kQueries = kWidth <= 96 ? 64 : 32;  // of a tile: as many as the registers hold scores of
  static constexpr bool kKeysInRegisters = kWidth <= 64;
  static constexpr int kQueryBytes = kQueries * kWidth * 2;
  // Of the block's shared memory: keys; two buffers of queries, grad_output and two statistics; the gradient of scores.
  static constexpr int kBuffers = kKeys * kWidth * 2;
  static constexpr int kBufferBytes = 2 * kQueryBytes + 2 * kQueries * 4;
  static constexpr int kGradScores = kBuffers + 2 * kBufferBytes;
  static constexpr int kSharedBytes = kGradScores + kKeys * kQueries * 2;
  static_assert(kBuffers <= 2 * kBufferBytes && kQueries <= kMaxQueryTile, "a tile of values fits where queries come");
  static_assert(kSharedBytes <= kSharedWithOptIn, "for every GPU");
  // Of the gradient of a tile of queries each warp has 16 rows, and of the columns by sixteens one of kWarps.
  static constexpr int kSlices = kQueries / 16;
  static constexpr int kWarps = 8 / kSlices, kStep = kWarps * 2, kColumns = kWidth / 8 / kWarps;
};

struct Bwd {
  AttentionBwdParams p;
  Scores scores;
  Dropout dropout;
  float scale;
  int tiles;  // of queries, of the longest sequence
};

// This thread's place in a sum of the gradient of queries: tile after tile, as the fragments are in registers.
template <int kWidth>
__device__ float* partial_sum(const AttentionBwdParams& p, const Sequence& sequence, int split, int head, int tile) {
  constexpr int kQueries = Shape<kWidth>::kQueries;
  const int64_t rows = int64_t{p.batch} * p.queries, before = int64_t{sequence.batch} * p.queries + sequence.q_start;
  const int64_t tiles = rows / kQueries + p.sequences + 1;  // each sequence begins a tile, and may leave one half empty
  const int64_t number = (int64_t{split} * p.heads + head) * tiles + before / kQueries + sequence.number + tile;
  return p.partial + number * (kQueries * kWidth) + threadIdx.x / 32 * (Shape<kWidth>::kColumns * 128) +
         threadIdx.x % 32 * 4;
}

// Statistics -------------------------------------------------------------------------------------------------------

constexpr int kStatRows = 64;  // of a block, 16 of a warp
constexpr int kStatThreads = kStatRows * 2;
template <int kWidth>
constexpr int kStatBytes = 2 * kStatRows * kWidth * 2;  // of shared memory

template <typename T, int kWidth>
__global__ void __launch_bounds__(kStatThreads) attention_stats_kernel(const __grid_constant__ Bwd f) {
  if (!kAtLeastSm80) return device_assert(false, "attention needs compute capability 8.0");
  constexpr int kTileBytes = kStatBytes<kWidth> / 2;
  FASTLM_DYNAMIC_SHARED(unsigned char, shared);
  const AttentionBwdParams& p = f.p;
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16;
  const int64_t tiles = (p.queries + kStatRows - 1) / kStatRows, head = blockIdx.x / tiles;  // of all in the batch
  const int first = static_cast<int>(blockIdx.x % tiles) * kStatRows, count = min(p.queries - first, kStatRows);
  const auto copy = [&](int tile, const void* tensor, const Four& strides) {
    const T* const from = static_cast<const T*>(tensor) + head / p.heads * strides.at[0] +
                          head % p.heads * strides.at[1] + first * strides.at[2];
    Tile<kWidth>::template copy<kStatRows, kStatThreads>(
        shared + tile, [&](int row) { return from + row * strides.at[2]; }, count, p.value_dim, from);
  };
  copy(0, p.output, p.output_strides);
  copy(kTileBytes, p.grad_output, p.grad_output_strides);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  uint32_t output[1][kWidth / 16][4];
  load_rows<kWidth>(output, shared, warp_row * kWidth * 2 + Tile<kWidth>::down(lane));
  float products[1][2][4];
  set(products, 0.0f);
  multiply_rows<T, kWidth>(products, from_registers(output), shared,
                           kTileBytes + warp_row * kWidth * 2 + Tile<kWidth>::along(lane));
  // Of the 16 x 16 products those of a row with itself.
  if (lane % 4 != lane / 8) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp_row + half * 8 + lane / 4;
    if (row >= count) continue;
    const int64_t number = head * p.queries + first + row;
    const float lse = p.lse[number];
    p.stats[number] = lse == -INFINITY ? -INFINITY : -lse * kLog2e;  // of nothing seen all is 0
    p.stats[int64_t{p.batch} * p.heads * p.queries + number] =
        lane / 4 % 2 == 0 ? products[0][half][half * 2] : products[0][half][half * 2 + 1];
  }
}

// Gradients --------------------------------------------------------------------------------------------------------

// All that makes scores of products but the scale, if that is all there is; and the gradient of what the soft cap is
// given, of which delta will be subtracted. Rows are keys.
template <int N>
__device__ void finish_scores(const Bwd& f, const Sequence& sequence, int head, float (&s)[1][N][4],
                              float (&grad)[1][N][4], const float* delta, int first_key, int first_query, bool edge,
                              int lane) {
  const auto query = [&](int n, int e) { return first_query + n * 8 + lane % 4 * 2 + e % 2; };
  const auto key = [&](int e) { return first_key + e / 2 * 8 + lane / 4; };
  if (f.scores.capped()) {
    for_each_element<1, N>([&](int m, int n, int e) {
      const float less = delta[n * 8 + lane % 4 * 2 + e % 2];
      float slope;
      s[m][n][e] = f.scores.cap(s[m][n][e], slope);
      grad[m][n][e] = (grad[m][n][e] - less) * slope + less;
    });
  } else if (f.scores.general()) {
    for_each_element<1, N>([&](int m, int n, int e) { s[m][n][e] = f.scores.scaled(s[m][n][e]); });
  }
  if (f.scores.biased()) {
    const float slope = f.scores.slope(sequence.number * f.p.heads + head);
    for_each_element<1, N>([&](int m, int n, int e) {
      s[m][n][e] = Scores::bias(s[m][n][e], slope, query(n, e) + sequence.offset - key(e));
    });
  }
  if (edge) {
    for_each_element<1, N>([&](int m, int n, int e) {
      if (!sequence.sees(query(n, e), key(e))) s[m][n][e] = -INFINITY;
    });
  }
}

// Applies dropout to the gradient of probabilities; returns what is kept, four bits for each fragment.
template <int N>
__device__ uint32_t drop_all(const Bwd& f, float (&grad)[1][N][4], int64_t row, int first_key, int lane) {
  static_assert(N * 4 <= 32, "a bit for each element");
  uint32_t all = 0;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const uint32_t kept = kept_of_columns(f.dropout, f.p.rng_state, row + n * 8 + lane % 4 * 2, first_key, lane);
    all |= kept << n * 4;
#pragma unroll
    for (int e = 0; e < 4; ++e) grad[0][n][e] = f.dropout(grad[0][n][e], kept >> e & 1);
  }
  return all;
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads, 1) attention_bwd_kernel(const __grid_constant__ Bwd f) {
  if (!kAtLeastSm80) return device_assert(false, "attention needs compute capability 8.0");
  using S = Shape<kWidth>;
  constexpr int N = S::kQueries / 8;
  FASTLM_DYNAMIC_SHARED(unsigned char, shared);
  const AttentionBwdParams& p = f.p;
  const int lane = threadIdx.x % 32, warp_key = threadIdx.x / 32 * 16;
  // Where this lane finds what products take, held in registers: rows of keys and values; columns of keys; and of the
  // gradient of scores.
  using GradScores = Tile<S::kQueries>;
  const int along = not_before(Tile<kWidth>::along(lane)), down = not_before(Tile<kWidth>::down(lane));
  const int own_rows = warp_key * kWidth * 2 + down;
  const int columns = Tile<kWidth>::moved(down, 0, threadIdx.x / 32 / S::kSlices * 2);
  const int grad_columns =
      S::kGradScores + GradScores::moved(GradScores::along(lane), 0, threadIdx.x / 32 % S::kSlices * 2);
  const int grad_element = not_before(S::kGradScores + GradScores::element(warp_key, lane));

  const int split = blockIdx.x % p.splits, kv_head = blockIdx.x / p.splits % p.kv_heads;
  const Sequence sequence(p, blockIdx.x / p.splits / p.kv_heads);
  const int group = p.heads / p.kv_heads;
  const int rows = p.cu_seqlens_q == nullptr ? p.keys : sequence.keys;  // those not filled of a cache get zeros
  using Source = Rows16<kWidth, kThreads>;

  for (int tile = split; tile * kKeys < rows; tile += p.splits) {
    const int first_key = tile * kKeys;
    const auto all_rows = [&](const void* tensor, const Four& strides, int columns) {
      return Source(sequence.key_rows(static_cast<const T*>(tensor), strides, kv_head), strides.at[2], first_key,
                    sequence.keys, columns);
    };
    __syncthreads();
    all_rows(p.key, p.key_strides, p.head_dim).template copy<kKeys>(shared);
    all_rows(p.value, p.value_strides, p.value_dim).template copy<kKeys>(shared + S::kBuffers);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    uint32_t k[1][S::kKeysInRegisters ? kWidth / 16 : 1][4], v[1][kWidth / 16][4];
    if constexpr (S::kKeysInRegisters) load_rows<kWidth>(k, shared, own_rows);
    load_rows<kWidth>(v, shared, S::kBuffers + own_rows);
    const auto keys = [&](int step, uint32_t (&left)[1][4]) {
      if constexpr (S::kKeysInRegisters) {
        from_registers(k)(step, left);
      } else {
        ldmatrix<4>(left[0], shared + Tile<kWidth>::moved(own_rows, 0, step * 2));
      }
    };
    float grad_key[1][kWidth / 8][4], grad_value[1][kWidth / 8][4];
    set(grad_key, 0.0f);
    set(grad_value, 0.0f);
    __syncthreads();  // all have their values: queries come where these were

    const Tiles queries = sequence.that_see(first_key, first_key + kKeys - 1, S::kQueries);
    // Tiles of queries whose scores are products, times the scale.
    const Tiles plain = f.scores.general() || p.rng_state != nullptr
                            ? Tiles{0, 0}
                            : sequence.that_all_see(first_key, first_key + kKeys - 1, S::kQueries);
    // Tiles of queries that saw keys of this block before: those whose sums have begun.
    const int before = first_key - p.splits * kKeys;
    const int earlier = before < 0 ? 0 : sequence.that_see(before, before + kKeys - 1, S::kQueries).stop;
    Source query(static_cast<const T*>(p.query), 0, 0, 0, 0), grad_output = query;
    const float* stats = p.stats;
    const auto fill = [&](unsigned char* buffer, int head, int at) {
      const int first = at * S::kQueries;
      if (at == queries.start) {
        query = Source(sequence.query_rows(static_cast<const T*>(p.query), p.query_strides, head),
                       p.query_strides.at[2], first, sequence.queries, p.head_dim);
        grad_output = Source(sequence.query_rows(static_cast<const T*>(p.grad_output), p.grad_output_strides, head),
                             p.grad_output_strides.at[2], first, sequence.queries, p.value_dim);
        stats = p.stats + sequence.row(p, head) + first + threadIdx.x % S::kQueries;
        if (threadIdx.x >= S::kQueries) stats += int64_t{p.batch} * p.heads * p.queries;
      }
      query.template copy<S::kQueries>(buffer);
      grad_output.template copy<S::kQueries>(buffer + S::kQueryBytes);
      if (threadIdx.x < 2 * S::kQueries) {
        const int bytes = first + static_cast<int>(threadIdx.x) % S::kQueries < sequence.queries ? 4 : 0;
        cp_async<4>(buffer + 2 * S::kQueryBytes + threadIdx.x * 4, stats, bytes);
        stats += S::kQueries;
      }
      cp_async_commit();
    };

    const int last_head = (kv_head + 1) * group;  // less one
    int now = S::kBuffers, head = queries.start < queries.stop ? kv_head * group : last_head, at = queries.start;
    float* sum = p.partial;
    if (head < last_head) fill(shared + now, head, at);
    while (head < last_head) {
      const bool wraps = at + 1 == queries.stop;
      const int next_head = wraps ? head + 1 : head, next = wraps ? queries.start : at + 1;
      cp_async_wait<0>();
      __syncthreads();  // all see this tile, and none reads any more what lies where the next one goes
      if (next_head < last_head) fill(shared + (2 * S::kBuffers + S::kBufferBytes - now), next_head, next);
      const float* const minus_lse = reinterpret_cast<const float*>(shared + now + 2 * S::kQueryBytes);
      const float* const delta = minus_lse + S::kQueries;
      const int first_query = at * S::kQueries;

      float s[1][N][4], grad[1][N][4];  // the second of probabilities, then of scores
      set(s, 0.0f);
      set(grad, 0.0f);
      multiply_rows<T, kWidth>(s, keys, shared, now + along);
      multiply_rows<T, kWidth>(grad, from_registers(v), shared, now + S::kQueryBytes + along);
      uint32_t kept = 0;
      if (!plain.have(at)) {
        const int own_lane = not_before(lane), own_key = first_key + warp_key;
        if (p.rng_state != nullptr) {
          kept = drop_all(f, grad, sequence.row(p, head) + first_query, own_key, own_lane);
        }
        const Tiles whole = sequence.that_all_see(first_key, first_key + kKeys - 1, S::kQueries);
        finish_scores(f, sequence, head, s, grad, delta, own_key, first_query, !whole.have(at), own_lane);
      }
#pragma unroll
      for (int n = 0; n < N; ++n) {
        float less[2], deltas[2];
        load<2>(minus_lse + n * 8 + lane % 4 * 2, less);
        load<2>(delta + n * 8 + lane % 4 * 2, deltas);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          s[0][n][e] = exp2_approx(fmaf(s[0][n][e], f.scores.unit, less[e % 2]));
          grad[0][n][e] = s[0][n][e] * (grad[0][n][e] - deltas[e % 2]);
        }
      }
      uint32_t probabilities[1][N / 2][4], grads[1][N / 2][4];
      pack_all<T>(s, probabilities);
      pack_all<T>(grad, grads);
      if (p.rng_state != nullptr) {
#pragma unroll
        for (int n = 0; n < 2 * N; ++n) {
          uint32_t& two = probabilities[0][n / 4][n % 4];
          two = drop(two, kept >> n * 2);
        }
      }
#pragma unroll
      for (int n = 0; n < 2 * N; ++n) {
        const int place = GradScores::moved(grad_element, n % 2 * 8, n / 2);
        *reinterpret_cast<uint32_t*>(shared + place) = grads[0][n / 4][n % 4];
      }
      multiply_columns<T, kWidth, N / 2>(grad_value, from_registers(probabilities), shared,
                                         now + S::kQueryBytes + down);
      multiply_columns<T, kWidth, N / 2>(grad_key, from_registers(grads), shared, now + down);

      __syncthreads();  // all see the gradient of scores; the next barrier is before any is written again
      if (p.grad_query != nullptr) {
        if (at == queries.start) sum = partial_sum<kWidth>(p, sequence, split, head, at);
        float grad_query[1][S::kColumns][4];
        set(grad_query, 0.0f);
        if (at < earlier) {
#pragma unroll
          for (int n = 0; n < S::kColumns; ++n) load<4>(sum + n * 128, grad_query[0][n]);
        }
        const auto rows_of_queries = [&](int step, uint32_t (&left)[1][4]) {
          ldmatrix_trans<4>(left[0], shared + GradScores::moved(grad_columns, step * 16, 0));
        };
        multiply_columns<T, kWidth, kKeys / 16, S::kStep>(grad_query, rows_of_queries, shared, columns);
#pragma unroll
        for (int n = 0; n < S::kColumns; ++n) store<4>(sum + n * 128, grad_query[0][n]);
        sum += S::kQueries * kWidth;
      }
      now = 2 * S::kBuffers + S::kBufferBytes - now;
      head = next_head;
      at = next;
    }

    __syncthreads();
    const float key_scale = f.scale, value_scale = f.dropout.scale;
    const int element = Tile<kWidth>::element(warp_key, lane);
    store_rows<T, kWidth>(shared, element, grad_key[0], key_scale, key_scale);
    store_rows<T, kWidth>(shared, S::kBuffers + element, grad_value[0], value_scale, value_scale);
    __syncthreads();
    const auto write = [&](const unsigned char* from, void* tensor, const Four& strides, int columns) {
      if (tensor == nullptr) return;
      T* const to = sequence.key_rows(static_cast<T*>(tensor), strides, kv_head) + first_key * strides.at[2];
      Tile<kWidth>::template write<kKeys, kThreads, T>(
          from, [&](int row) { return to + row * strides.at[2]; }, rows - first_key, columns);
    };
    write(shared, p.grad_key, p.grad_key_strides, p.head_dim);
    write(shared + S::kBuffers, p.grad_value, p.grad_value_strides, p.value_dim);
  }
}

// Adds the sums of the blocks that had keys which a tile of queries sees.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) attention_grad_query_kernel(const __grid_constant__ Bwd f) {
  using S = Shape<kWidth>;
  FASTLM_DYNAMIC_SHARED(unsigned char, shared);
  const AttentionBwdParams& p = f.p;
  const int tile = blockIdx.x % f.tiles, head = blockIdx.x / f.tiles % p.heads, first = tile * S::kQueries;
  const Sequence sequence(p, blockIdx.x / f.tiles / p.heads);
  if (first >= sequence.queries) return;
  const Tiles keys = sequence.seen_by(first, first + S::kQueries - 1, kKeys);
  float sums[S::kColumns][4] = {};
  for (int split = 0; split < p.splits; ++split) {
    const int first_tile = keys.start + (split - keys.start % p.splits + p.splits) % p.splits;
    if (first_tile >= keys.stop) continue;
    const float* const sum = partial_sum<kWidth>(p, sequence, split, head, tile);
#pragma unroll
    for (int n = 0; n < S::kColumns; ++n) {
      float four[4];
      load<4>(sum + n * 128, four);
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[n][e] += four[e];
    }
  }
  const int warp = threadIdx.x / 32, element = Tile<kWidth>::element(warp % S::kSlices * 16, threadIdx.x % 32);
  store_rows<T, kWidth, S::kStep>(shared, Tile<kWidth>::moved(element, 0, warp / S::kSlices * 2), sums, f.scale,
                                  f.scale);
  __syncthreads();
  T* const to = sequence.query_rows(static_cast<T*>(p.grad_query), p.grad_query_strides, head) +
                first * p.grad_query_strides.at[2];
  Tile<kWidth>::template write<S::kQueries, kThreads, T>(
      shared, [&](int row) { return to + row * p.grad_query_strides.at[2]; }, sequence.queries - first, p.head_dim);
}

// Launches ---------------------------------------------------------------------------------------------------------

template <typename T, int kWidth>
const char* start_bwd(Bwd f, int device, void* stream) {
  const AttentionBwdParams& p = f.p;
  f.tiles = (p.max_queries + Shape<kWidth>::kQueries - 1) / Shape<kWidth>::kQueries;
  const int64_t row_blocks = int64_t{p.batch} * p.heads * ((p.queries + kStatRows - 1) / kStatRows);
  const int64_t blocks = int64_t{p.splits} * p.kv_heads * p.sequences;
  const int64_t query_blocks = int64_t{f.tiles} * p.heads * p.sequences;
  if (std::max({row_blocks, blocks, query_blocks}) > std::numeric_limits<int>::max()) {
    return "more tiles than a grid can have";
  }
  const auto grid = [](int64_t count) { return dim3(static_cast<unsigned>(count)); };
  const char* error =
      launch(attention_stats_kernel<T, kWidth>, grid(row_blocks), kStatThreads, f, device, stream, kStatBytes<kWidth>);
  if (error == nullptr) {
    error =
        launch(attention_bwd_kernel<T, kWidth>, grid(blocks), kThreads, f, device, stream, Shape<kWidth>::kSharedBytes);
  }
  if (error == nullptr && p.grad_query != nullptr) {
    error = launch(attention_grad_query_kernel<T, kWidth>, grid(query_blocks), kThreads, f, device, stream,
                   Shape<kWidth>::kQueryBytes);
  }
  return error;
}

template <typename T>
const char* start_bwd(const Bwd& f, int device, void* stream) {
  const int width = std::max(f.p.head_dim, f.p.value_dim);
  if (width <= 32) return start_bwd<T, 32>(f, device, stream);
  if (width <= 64) return start_bwd<T, 64>(f, device, stream);
  if (width <= 96) return start_bwd<T, 96>(f, device, stream);
  if (width <= 128) return start_bwd<T, 128>(f, device, stream);
  return "head dimensions go up to 128";
}

template <typename T, int kWidth>
void register_width() {
  const std::string type = std::string("<") + kTypeName<T> + ", " + std::to_string(kWidth) + ">";
  register_kernel("attention_stats" + type, attention_stats_kernel<T, kWidth>, kStatThreads, kStatBytes<kWidth>);
  register_kernel("attention_bwd" + type, attention_bwd_kernel<T, kWidth>, kThreads, Shape<kWidth>::kSharedBytes);
  register_kernel("attention_grad_query" + type, attention_grad_query_kernel<T, kWidth>, kThreads,
                  Shape<kWidth>::kQueryBytes);
}

template <typename T>
void register_kernels() {
  register_width<T, 32>();
  register_width<T, 64>();
  register_width<T, 96>();
  register_width<T, 128>();
}

const bool registered = [] {
  register_kernels<__nv_bfloat16>();
  register_kernels<__half>();
  return true;
}();

}  // namespace

const char* attention_bwd(const AttentionBwdParams& p, int device, void* stream) {
  const Bwd f = {p, Scores(p), Dropout(p.dropout_p), static_cast<float>(p.scale), 0};
  if (p.dtype == DType::kBFloat16) return start_bwd<__nv_bfloat16>(f, device, stream);
  if (p.dtype == DType::kFloat16) return start_bwd<__half>(f, device, stream);
  return "attention is of bf16 and fp16";
}

}  // namespace fastlm
