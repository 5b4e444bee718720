// Attention on the CPU; equations in attention.h, products and the layouts they take in product_cpu.h.
//
// Forward: a thread takes a key head of a sequence, lays out its keys and values, and walks with blocks of queries over
// tiles of keys (online softmax: exponents are less by a base that is raised only when a score is far above it).
// Backward: a thread takes a key head, or a part of its keys, lays out the queries that share it, and walks with tiles
// of keys over blocks of queries. What a tile adds to the gradient of queries goes to a sum in fp32; where the keys are
// in several parts, of which there are as many as their number asks for, whatever the number of threads, the sums are
// added in order. So the result does not depend on the number of threads. Five products, as in the equations.
//
// Bytes of memory to work in, for a thread: forward 4T(D + D_v), backward 12T(D + D_v), of T keys and of T queries of
// all heads that share a key head; nothing grows with their product.
#include <cmath>

#include "attention/attention.h"
#include "attention/scores_cpu.h"
#include "common/cpu_rows.h"

namespace fastlm {
namespace {

constexpr int kBlock = 48;      // rows of scores that meet one tile of keys after the other
constexpr float kSlack = 6.0f;  // by how much a score may be above the base of its row
constexpr float kLog2e = 1.4426950408889634f;

// Elements that are computed where there are `cols`.
template <typename K>
int wide(int cols) {
  return static_cast<int>(round_up(cols, K::kRows > 1 ? 2 * kLane : kLane));
}

// Rows of a head.
template <typename T>
RowsOf<T> query_rows(const Sequence& sequence, const void* tensor, const Four& strides, int head, int64_t cols) {
  return {sequence.query_rows(static_cast<const T*>(tensor), strides, head), strides.at[2], cols};
}
template <typename T>
RowsOf<T> key_rows(const Sequence& sequence, const void* tensor, const Four& strides, int head, int64_t cols) {
  return {sequence.key_rows(static_cast<const T*>(tensor), strides, head), strides.at[2], cols};
}
template <typename T>
RowsOf<T> from_row(const RowsOf<T>& rows, int64_t first) {
  return {rows.at + first * rows.row, rows.row, rows.cols};
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
  for (int64_t c = 0; c < cols; c += kLane) store(to + c, load(from + c) * factor, cols - c);
}

// As many threads as there are, unless the work is less than waking them.
int threads_for_work(int64_t tasks, int64_t products) {
  const int64_t most = omp_get_max_threads();
  return products < kSmall ? 1 : static_cast<int>(tasks < most ? tasks : most);
}

constexpr const char* kNoMemory = "out of memory for the keys and queries to be laid out in";

// Forward -----------------------------------------------------------------------------------------------------------

template <typename K>
struct FwdSpace {
  Workspace<uint32_t> natural, keys, values, query, probabilities;
  Workspace<float> output;

  FwdSpace(const AttentionFwdParams& p, int64_t tiles)
      : natural(kTile, larger(natural_words<K>(p.head_dim), natural_words<K>(p.value_dim))),
        keys(tiles, kTile * natural_words<K>(p.head_dim)),
        values(tiles, kTile / K::kPer * paired_words(p.value_dim)),
        query(kBlock, natural_words<K>(p.head_dim)),
        probabilities(kBlock, kTile / K::kPer),
        output(kBlock, paired_words(p.value_dim)) {}

  bool failed() const {
    return natural.failed() || keys.failed() || values.failed() || query.failed() || probabilities.failed() ||
           output.failed();
  }
};

// A row of probabilities in the making: the sum of exponentials of scores less the base.
struct Row {
  float base;
  Vec<float> total;
};

// Scores to probabilities; returns by what was summed before is to be multiplied. kPlain: of kTile columns, without
// dropout.
template <typename K, bool kPlain>
float softmax(int cols, const float* s, float unit, const float* dropout, Row& row, uint32_t* probabilities) {
  if (kPlain) cols = kTile;
  Vec<float> tops = broadcast<float>(-INFINITY);
  for (int at = 0; at < cols; at += kLane) tops = max(load(s + at), tops);
  float factor = 1.0f;
  if (any(tops * unit - row.base > kSlack)) {  // also above -inf, where nothing was seen yet
    const float top = largest<float>(tops) * unit;
    factor = exp2(broadcast<float>((row.base - top) * kLog2e))[0];
    row.total *= factor;
    row.base = top;
  }
  const Vec<float> units = broadcast<float>(unit), less = broadcast<float>(row.base == -INFINITY ? 0.0f : -row.base);
  typename K::Element* const to = reinterpret_cast<typename K::Element*>(probabilities);
  Vec<float> total = row.total;
  FASTLM_UNROLL for (int at = 0; at < cols; at += 2 * kLane) {
    Vec<float> p[2];
    FASTLM_UNROLL for (int n = 0; n < 2; ++n) {
      const int here = at + n * kLane;
      if (!kPlain && here >= cols) return row.total = total, store(to + at, p[0]), factor;
      p[n] = exp2(multiply_add(load(s + here), units, less) * kLog2e);
      total += p[n];
      if (!kPlain && dropout != nullptr) p[n] = dropped(p[n], load(dropout + here));
    }
    store_two(to + at, p[0], p[1]);
  }
  row.total = total;
  return factor;
}

template <typename T>
class Forward {
  using K = typename WordsOf<T>::type;
  using P = AttentionFwdCpuParams;

 public:
  Forward(const P& p, int chunks) : p_(p), scores_(p, p), chunks_(chunks) {}

  // A key head of a sequence, and of its blocks of queries or parts of the keys one in `chunks`.
  void task(int64_t number, FwdSpace<K>& space) const {
    const int64_t of_splits = number / chunks_ * chunks_;
    const int chunk = static_cast<int>(number - of_splits), split = static_cast<int>(number / chunks_ % p_.splits);
    const int kv_head = static_cast<int>(number / chunks_ / p_.splits % p_.kv_heads);
    const Sequence sequence(p_, static_cast<int>(number / chunks_ / p_.splits / p_.kv_heads));
    const int group = p_.heads / p_.kv_heads, first_head = kv_head * group;
    const int rows = p_.grouped ? sequence.queries * group : sequence.queries, heads = p_.grouped ? 1 : group;
    const int blocks = (rows + kBlock - 1) / kBlock;
    if (rows == 0) return;

    const Tiles all = sequence.seen_by(0, sequence.queries - 1, kTile);
    const int part = (all.stop - all.start + p_.splits - 1) / p_.splits;
    const Tiles own = {smaller(all.start + split * part, all.stop), smaller(all.start + (split + 1) * part, all.stop)};
    lay_out(sequence, kv_head, own, space);
    for (int n = chunk; n < blocks * heads; n += chunks_) {
      const int first = n % blocks * kBlock;
      block(sequence, first_head + n / blocks, first, smaller(rows - first, kBlock), own, split, space);
    }
  }

  // Adds what parts of the keys gave, of one row.
  void combine(int64_t row) const {
    const int64_t rows = int64_t{p_.batch} * p_.heads * p_.queries;
    float base = -INFINITY, total = 0.0f;
    for (int split = 0; split < p_.splits; ++split) base = fmaxf(base, p_.part_lse[split * rows + row]);
    const int64_t head = row / p_.queries % p_.heads, batch = row / p_.queries / p_.heads;
    T* const to = static_cast<T*>(p_.output) + batch * p_.output_strides.at[0] + head * p_.output_strides.at[1] +
                  row % p_.queries * p_.output_strides.at[2];
    float weights[kMaxSplits];
    for (int split = 0; split < p_.splits; ++split) {
      const float lse = p_.part_lse[split * rows + row];
      weights[split] = base == -INFINITY ? 0.0f : exp(broadcast<float>(lse - base))[0];
      total += weights[split];
    }
    p_.lse[row] = total == 0.0f ? -INFINITY : base + logf(total);
    for (int64_t c = 0; c < p_.value_dim; c += kLane) {
      Vec<float> sum = {};
      for (int split = 0; split < p_.splits; ++split) {
        const float* const from = p_.parts + (split * rows + row) * p_.value_dim + c;
        sum += load(from, p_.value_dim - c) * weights[split];
      }
      store(to + c, sum * (total == 0.0f ? 0.0f : 1.0f / total), p_.value_dim - c);
    }
  }

  static constexpr int kMaxSplits = 1 << 10;

 private:
  const P& p_;
  Scores scores_;
  int chunks_;

  void lay_out(const Sequence& sequence, int kv_head, const Tiles& tiles, FwdSpace<K>& space) const {
    const auto keys = key_rows<T>(sequence, p_.key, p_.key_strides, kv_head, p_.head_dim);
    const auto values = key_rows<T>(sequence, p_.value, p_.value_strides, kv_head, p_.value_dim);
    for (int tile = tiles.start; tile < tiles.stop; ++tile) {
      const int first = tile * kTile, count = smaller(sequence.keys - first, kTile);
      const First key = natural_rows<K>(from_row(keys, first), count, kTile, space.natural.row(0));
      transpose_rows(key, kTile, natural_words<K>(p_.head_dim), space.keys.row(tile - tiles.start));
      lay_out_rows<K>(from_row(values, first), count, space.natural.row(0), space.values.row(tile - tiles.start),
                      nullptr);
    }
  }

  // A row of scores: of a query, or of one of the heads that share a key head.
  struct Place {
    int head, query;
    int64_t number;  // among the rows of the log-sum-exp and of dropout
  };

  void block(const Sequence& sequence, int head, int first, int count, const Tiles& own, int split,
             FwdSpace<K>& space) const {
    Place places[kBlock];
    Row rows[kBlock];
    for (int r = 0; r < count; ++r) {
      const int of = p_.grouped ? head + (first + r) / sequence.queries : head;
      const int query = p_.grouped ? (first + r) % sequence.queries : first + r;
      places[r] = {of, query, sequence.row(p_, of) + query};
      rows[r].base = -INFINITY, rows[r].total = Vec<float>{};
    }
    First queries = {space.query.row(0), natural_words<K>(p_.head_dim)};
    for (int r = 0, run; r < count; r += run) {  // of a head
      run = smaller(count - r, sequence.queries - places[r].query);
      const auto all = query_rows<T>(sequence, p_.query, p_.query_strides, places[r].head, p_.head_dim);
      const auto source = from_row(all, places[r].query);
      if (run < count || count % K::kRows != 0) {
        pack_natural<K>(source, run, run, space.query.row(r));
      } else {
        queries = natural_rows<K>(source, run, run, space.query.row(0));
      }
    }
    const int64_t width = paired_words(p_.value_dim);
    memset(space.output.row(0), 0, count * width * sizeof(float));

    const int first_query = p_.grouped ? 0 : first, last_query = p_.grouped ? sequence.queries - 1 : first + count - 1;
    const Tiles seen = sequence.seen_by(first_query, last_query, kTile);
    const Tiles whole = sequence.all_seen_by(first_query, last_query, kTile);
    for (int tile = larger(seen.start, own.start); tile < smaller(seen.stop, own.stop); ++tile) {
      const int first_key = tile * kTile, keys = smaller(sequence.keys - first_key, kTile);
      const bool plain = !scores_.general() && whole.have(tile);
      int cols[kBlock];  // of a strip, of those keys that any of its rows sees
      for (int r = 0, strip; r < count; r += strip) {
        strip = strip_of<K>(count - r);
        const int here = smaller(strip, count - r);
        cols[r] = 0;
        for (int n = r; n < r + here; ++n) {
          cols[r] = larger(cols[r], smaller(sequence.last_seen(places[n].query) + 1 - first_key, kTile));
        }
        if (cols[r] == 0) continue;
        alignas(64) float s[K::kStrip * kTile], dropout[kDropoutColumns];
        multiply_all<K>(strip, wide<K>(cols[r]), {s, kTile, true}, {queries.at + r * queries.row, queries.row},
                          {space.keys.row(tile - own.start), kTile}, steps_of<K>(p_.head_dim));
        for (int n = 0; n < here; ++n) {
          const Place& place = places[r + n];
          float* const row = s + n * kTile;
          if (!plain) {
            scores_.finish(sequence, {place.head, place.query, first_key, true, keys}, wide<K>(cols[r]), row, nullptr);
          }
          if (p_.rng_state != nullptr) {
            dropout_factors(p_.dropout_p, p_.rng_state, place.number, first_key, dropout);
          }
          const bool simple = cols[r] == kTile && p_.rng_state == nullptr;
          const float factor = (simple ? softmax<K, true> : softmax<K, false>)(
              wide<K>(cols[r]), row, scores_.unit, p_.rng_state ? dropout : nullptr, rows[r + n],
              space.probabilities.row(r + n));
          if (factor != 1.0f) write_row(space.output.row(r + n), factor, width, space.output.row(r + n));
        }
      }
      for (int r = 0, strip; r < count; r += strip) {
        strip = strip_of<K>(count - r);
        if (cols[r] == 0) continue;
        multiply_all<K>(strip, width, {space.output.row(r), width, false},
                          {space.probabilities.row(r), kTile / K::kPer}, {space.values.row(tile - own.start), width},
                          steps_of<K>(cols[r]));
      }
    }
    for (int r = 0; r < count; ++r) {
      const Place& row = places[r];
      const float total = sum<float>(rows[r].total);
      const float lse = total == 0.0f ? -INFINITY : rows[r].base + logf(total);
      const float scale = total == 0.0f ? 0.0f : 1.0f / total;
      if (p_.parts == nullptr) {
        T* const to = sequence.query_rows(static_cast<T*>(p_.output), p_.output_strides, row.head);
        write_row(space.output.row(r), scale, p_.value_dim, to + row.query * p_.output_strides.at[2]);
        p_.lse[row.number] = lse;
      } else {
        const int64_t number = split * (int64_t{p_.batch} * p_.heads * p_.queries) + row.number;
        write_row(space.output.row(r), scale, p_.value_dim, p_.parts + number * p_.value_dim);
        p_.part_lse[number] = lse;
      }
    }
  }
};

template <typename T>
const char* fwd(const AttentionFwdCpuParams& p) {
  using K = typename WordsOf<T>::type;
  const int64_t units = int64_t{p.sequences} * p.kv_heads * p.splits, group = p.heads / p.kv_heads;
  if (p.splits > Forward<T>::kMaxSplits) return "more parts of the keys than there may be";
  const int64_t blocks =
      p.grouped ? (p.max_queries * group + kBlock - 1) / kBlock : (p.max_queries + kBlock - 1) / kBlock * group;
  const int64_t wanted = (4 * int64_t{omp_get_max_threads()} + units - 1) / units;
  const int chunks = p.splits > 1 ? 1 : static_cast<int>(wanted < blocks ? wanted : blocks);
  const int64_t tiles = (int64_t{p.max_keys} + kTile - 1) / kTile;
  const Forward<T> forward(p, chunks);
  const int64_t work = int64_t{p.batch} * p.heads * p.queries * p.max_keys;
  bool failed = false;
#pragma omp parallel num_threads(threads_for_work(units* chunks, work))
  {
    FwdSpace<K> space(p, (tiles + p.splits - 1) / p.splits);
    const TileConfig config;
    if (space.failed()) {
#pragma omp atomic write
      failed = true;
    }
#pragma omp barrier
    if (!failed) {
#pragma omp for schedule(dynamic)
      for (int64_t n = 0; n < units * chunks; ++n) forward.task(n, space);
      if (p.parts != nullptr) {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < int64_t{p.batch} * p.heads * p.queries; ++row) forward.combine(row);
      }
    }
  }
  return failed ? kNoMemory : nullptr;
}

// Backward ----------------------------------------------------------------------------------------------------------

template <typename K>
struct BwdSpace {
  // Of tiles of queries and their gradients of output, one head of the group after the other.
  Workspace<uint32_t> queries, query_pairs, grads, grad_pairs;
  Workspace<float> less, delta;
  Workspace<float> grad_queries;  // transposed
  // Of a tile of keys.
  Workspace<uint32_t> natural, key, value, key_columns;
  Workspace<float> grad_key, grad_value;
  // Of a tile of keys and one of queries, keys along the rows.
  Workspace<uint32_t> probabilities, grad_scores, grad_score_pairs;
  Workspace<float> dropout, dropout_rows;

  BwdSpace(const AttentionBwdParams& p, int64_t tiles)  // of queries of all heads of a group
      : queries(tiles, kTile * natural_words<K>(p.head_dim)),
        query_pairs(tiles, kTile / K::kPer * paired_words(p.head_dim)),
        grads(tiles, kTile * natural_words<K>(p.value_dim)),
        grad_pairs(tiles, kTile / K::kPer * paired_words(p.value_dim)),
        less(tiles, kTile),
        delta(tiles, kTile),
        grad_queries(tiles, kTile * paired_words(p.head_dim)),
        natural(kTile, larger(paired_words(p.head_dim), paired_words(p.value_dim))),
        key(kTile, natural_words<K>(p.head_dim)),
        value(kTile, natural_words<K>(p.value_dim)),
        key_columns(paired_words(p.head_dim), kTile / K::kPer),
        grad_key(kTile, paired_words(p.head_dim)),
        grad_value(kTile, paired_words(p.value_dim)),
        probabilities(kTile, kTile / K::kPer),
        grad_scores(kTile, kTile / K::kPer),
        grad_score_pairs(kTile / K::kPer, kTile),
        dropout(kTile, kTile),
        dropout_rows(kTile, kTile) {}

  bool failed() const {
    return queries.failed() || query_pairs.failed() || grads.failed() || grad_pairs.failed() || less.failed() ||
           delta.failed() || grad_queries.failed() || natural.failed() || key.failed() || value.failed() ||
           key_columns.failed() || grad_key.failed() || grad_value.failed() || probabilities.failed() ||
           grad_scores.failed() || grad_score_pairs.failed() || dropout.failed() || dropout_rows.failed();
  }
};

template <typename T>
class Backward {
  using K = typename WordsOf<T>::type;
  using P = AttentionBwdCpuParams;

 public:
  explicit Backward(const P& p) : p_(p), scores_(p, p) {}

  // A key head of a sequence, and of its tiles of keys every one in `splits`.
  void task(int64_t number, BwdSpace<K>& space) const {
    const int split = static_cast<int>(number % p_.splits);
    const int kv_head = static_cast<int>(number / p_.splits % p_.kv_heads);
    const Sequence sequence(p_, static_cast<int>(number / p_.splits / p_.kv_heads));
    const int group = p_.heads / p_.kv_heads, tiles = (sequence.queries + kTile - 1) / kTile;
    for (int n = 0; n < group * tiles; ++n) {
      lay_out(sequence, kv_head * group + n / tiles, n % tiles * kTile, n, space);
    }
    const int64_t width = paired_words(p_.head_dim), value_width = paired_words(p_.value_dim);
    memset(space.grad_queries.row(0), 0, group * tiles * kTile * width * sizeof(float));

    const int keys = p_.cu_seqlens_q == nullptr ? p_.keys : sequence.keys;  // those not filled of a cache get zeros
    for (int first_key = split * kTile; first_key < keys; first_key += p_.splits * kTile) {
      const Keys laid_out = lay_out_keys(sequence, kv_head, first_key, space);
      memset(space.grad_key.row(0), 0, kTile * width * sizeof(float));
      memset(space.grad_value.row(0), 0, kTile * value_width * sizeof(float));
      const Tiles that_see = sequence.that_see(first_key, first_key + kTile - 1, kTile);
      for (int n = 0; n < group; ++n) {
        for (int tile = that_see.start; tile < that_see.stop; ++tile) {
          tiles_meet(sequence, kv_head * group + n, tile * kTile, n * tiles + tile, first_key, laid_out, space);
        }
      }
      const auto write = [&](Workspace<float>& from, void* tensor, const Four& strides, double factor, int64_t cols) {
        if (tensor == nullptr) return;
        T* const to = sequence.key_rows(static_cast<T*>(tensor), strides, kv_head) + first_key * strides.at[2];
        for (int key = 0; key < smaller(keys - first_key, kTile); ++key) {
          write_row(from.row(key), static_cast<float>(factor), cols, to + key * strides.at[2]);
        }
      };
      write(space.grad_key, p_.grad_key, p_.grad_key_strides, p_.scale, p_.head_dim);
      write(space.grad_value, p_.grad_value, p_.grad_value_strides, 1.0, p_.value_dim);
    }
    for (int n = 0; p_.grad_query != nullptr && n < group * tiles; ++n) {
      write_queries(sequence, kv_head * group + n / tiles, n % tiles * kTile, n, split, space);
    }
  }

  // Adds what parts of the keys gave to the gradient of a head's queries, of a sequence.
  void add_parts(int64_t number) const {
    const Sequence sequence(p_, static_cast<int>(number / p_.heads));
    const int head = static_cast<int>(number % p_.heads);
    for (int row = 0; row < sequence.queries; ++row) {
      T* const to = grad_query_row(sequence, head, row);
      for (int64_t c = 0; c < p_.head_dim; c += kLane) {
        Vec<float> sum = {};
        for (int split = 0; split < p_.splits; ++split) {
          sum += load(part_row(sequence, head, row, split) + c, p_.head_dim - c);
        }
        store(to + c, sum * static_cast<float>(p_.scale), p_.head_dim - c);
      }
    }
  }

 private:
  const P& p_;
  Scores scores_;

  // Queries of a tile.
  struct Span {
    int start, stop;

    bool some() const { return start < stop; }
    int count() const { return stop - start; }
  };

  T* grad_query_row(const Sequence& sequence, int head, int row) const {
    return sequence.query_rows(static_cast<T*>(p_.grad_query), p_.grad_query_strides, head) +
           row * p_.grad_query_strides.at[2];
  }
  float* part_row(const Sequence& sequence, int head, int row, int split) const {
    const int64_t all = int64_t{p_.batch} * p_.heads * p_.queries;
    return p_.partial + (split * all + sequence.row(p_, head) + row) * p_.head_dim;
  }

  // A tile of queries of a head, their gradients of output and statistics.
  void lay_out(const Sequence& sequence, int head, int first, int tile, BwdSpace<K>& space) const {
    const int count = smaller(sequence.queries - first, kTile);
    uint32_t* const natural = space.natural.row(0);
    const auto query = query_rows<T>(sequence, p_.query, p_.query_strides, head, p_.head_dim);
    lay_out_rows<K>(from_row(query, first), count, natural, space.query_pairs.row(tile), space.queries.row(tile));
    const auto grad = query_rows<T>(sequence, p_.grad_output, p_.grad_output_strides, head, p_.value_dim);
    lay_out_rows<K>(from_row(grad, first), count, natural, space.grad_pairs.row(tile), space.grads.row(tile));
    // delta by the same products as the gradients of probabilities: so a query that sees one key has a gradient of
    // exactly 0, and not what two orders of adding leave.
    const auto rows = query_rows<T>(sequence, p_.output, p_.output_strides, head, p_.value_dim);
    const First output = natural_rows<K>(from_row(rows, first), count, kTile, natural);
    constexpr int kRows = K::kRows > 1 ? K::kRows : 4;
    alignas(64) float products[kRows * kLane];
    for (int row = 0; row < kTile; row += kRows) {
      multiply_all<K>(kRows, kLane, {products, kLane, true}, {output.at + row * output.row, output.row},
                        {space.grads.row(tile) + row / kLane * kLane, kTile}, steps_of<K>(p_.value_dim));
      for (int n = 0; n < kRows; ++n) space.delta.row(tile)[row + n] = products[n * kLane + (row + n) % kLane];
    }
    const float* const lse = p_.lse + sequence.row(p_, head) + first;
    for (int row = 0; row < kTile; ++row) {  // of a query that sees nothing all is 0
      space.less.row(tile)[row] = row < count && lse[row] != -INFINITY ? -lse[row] : -INFINITY;
    }
  }

  // A tile of keys and values, as rows.
  struct Keys {
    First key, value;
  };

  Keys lay_out_keys(const Sequence& sequence, int kv_head, int first_key, BwdSpace<K>& space) const {
    const int count = larger(smaller(sequence.keys - first_key, kTile), 0);
    const auto keys = key_rows<T>(sequence, p_.key, p_.key_strides, kv_head, p_.head_dim);
    const auto values = key_rows<T>(sequence, p_.value, p_.value_strides, kv_head, p_.value_dim);
    const First value = natural_rows<K>(from_row(values, first_key), count, kTile, space.value.row(0));
    const First key = natural_rows<K>(from_row(keys, first_key), count, kTile, space.key.row(0));
    First pairs = key;
    if constexpr (K::kPer > 1) {
      pair_rows(key, kTile, p_.head_dim, space.natural.row(0));
      pairs = {space.natural.row(0), paired_words(p_.head_dim)};
    }
    transpose_rows(pairs, kTile / K::kPer, paired_words(p_.head_dim), space.key_columns.row(0));
    return {key, value};
  }

  // The tile of keys that is laid out with one of queries, which is number `tile` of those laid out.
  void tiles_meet(const Sequence& sequence, int head, int first, int tile, int first_key, const Keys& keys,
                  BwdSpace<K>& space) const {
    if (p_.rng_state != nullptr) {
      const int64_t row = sequence.row(p_, head) + first;
      for (int n = 0; n < kTile; ++n) {
        dropout_factors(p_.dropout_p, p_.rng_state, row + n, first_key, space.dropout_rows.row(n));
      }
      transpose_rows({reinterpret_cast<const uint32_t*>(space.dropout_rows.row(0)), kTile}, kTile, kTile,
                     reinterpret_cast<uint32_t*>(space.dropout.row(0)));
    }
    const int last = smaller(first + kTile, sequence.queries) - 1;
    Span spans[kTile];  // of a strip of keys
    for (int key = 0, strip; key < kTile; key += strip) {
      strip = strip_of<K>(kTile - key);
      const int low_key = first_key + key, high_key = smaller(low_key + strip, sequence.keys) - 1;
      const int from = sequence.first_to_see(low_key) - first, to = sequence.last_to_see(high_key) + 1 - first;
      Span& span = spans[key];
      span.start = larger(from, 0) / wide<K>(1) * wide<K>(1);
      span.stop = low_key > high_key ? 0 : smaller(wide<K>(to), kTile);
      const Tiles whole = sequence.that_all_see(low_key, low_key + strip - 1, 1);
      const bool plain = !scores_.general() && whole.have(first) && whole.have(last);
      alignas(64) float s[K::kStrip * kTile], grad[K::kStrip * kTile], slopes[K::kStrip * kTile];
      if (span.some()) {
        multiply_all<K>(strip, span.count(), {s + span.start, kTile, true},
                          {keys.key.at + key * keys.key.row, keys.key.row},
                          {space.queries.row(tile) + span.start, kTile}, steps_of<K>(p_.head_dim));
        multiply_all<K>(strip, span.count(), {grad + span.start, kTile, true},
                          {keys.value.at + key * keys.value.row, keys.value.row},
                          {space.grads.row(tile) + span.start, kTile}, steps_of<K>(p_.value_dim));
      }
      for (int n = 0; !plain && span.some() && n < strip; ++n) {
        const int place = n * kTile + span.start, count = low_key + n < sequence.keys ? last + 1 - first : 0;
        scores_.finish(sequence, {head, first + span.start, low_key + n, false, count - span.start}, span.count(),
                       s + place, slopes + place);
      }
      const bool simple = span.count() == kTile && p_.rng_state == nullptr && !scores_.capped();
      const auto differentiate = simple ? &Backward::differentiate<true> : &Backward::differentiate<false>;
      (this->*differentiate)(strip, span, s, grad, scores_.capped() ? slopes : nullptr, tile, key, space);
    }
    // One product for all strips after the other: what is common to them stays in the nearest cache.
    const auto add = [&](Workspace<float>& to, int64_t cols, Workspace<uint32_t>& by, const uint32_t* with) {
      for (int key = 0, strip; key < kTile; key += strip) {
        strip = strip_of<K>(kTile - key);
        if (!spans[key].some()) continue;
        const int64_t skip = spans[key].start / K::kPer;
        multiply_all<K>(strip, cols, {to.row(key), cols, false}, {by.row(key) + skip, kTile / K::kPer},
                          {with + skip * cols, cols}, steps_of<K>(spans[key].count()));
      }
    };
    if (p_.grad_value != nullptr) {
      add(space.grad_value, paired_words(p_.value_dim), space.probabilities, space.grad_pairs.row(tile));
    }
    if (p_.grad_key != nullptr) {
      add(space.grad_key, paired_words(p_.head_dim), space.grad_scores, space.query_pairs.row(tile));
    }
    if (p_.grad_query == nullptr) return;
    const uint32_t* const pairs = K::kPer == 1 ? space.grad_scores.row(0) : space.grad_score_pairs.row(0);
    multiply_all<K>(p_.head_dim, kTile, {space.grad_queries.row(tile), kTile, false},
                    {space.key_columns.row(0), kTile / K::kPer}, {pairs, kTile}, steps_of<K>(kTile));
  }

  // From scores and gradients of probabilities, of a strip of keys and a span of a tile of queries, to probabilities
  // and gradients of scores in words; zeros for the other queries. kPlain: of all queries, without dropout and a soft
  // cap.
  template <bool kPlain>
  void differentiate(int strip, const Span& span, const float* s, const float* grad, const float* slopes, int tile,
                     int key, BwdSpace<K>& space) const {
    using Element = typename K::Element;
    const float *const less = space.less.row(tile), *const delta = space.delta.row(tile);
    const float* const dropout = p_.rng_state == nullptr ? nullptr : space.dropout.row(key);
    Element* const probabilities = reinterpret_cast<Element*>(space.probabilities.row(key));
    Element* const grad_scores = reinterpret_cast<Element*>(space.grad_scores.row(key));
    uint32_t* const pairs = K::kPer == 1 ? nullptr : space.grad_score_pairs.row(key / 2);
    const Vec<float> unit = broadcast<float>(scores_.unit);
    for (int row = 0; row < strip * kTile; row += 2 * kTile) {
      FASTLM_UNROLL for (int at = 0; at < kTile; at += 2 * kLane) {
        Vec<float> p[2][2] = {}, grads[2][2] = {};
        FASTLM_UNROLL for (int n = 0; n < 4; ++n) {
          const int column = at + n % 2 * kLane, here = row + n / 2 * kTile + column;
          if (!kPlain && !(span.start <= column && column < span.stop)) continue;
          Vec<float> kept = exp2(multiply_add(load(s + here), unit, load(less + column)) * kLog2e);
          Vec<float>& grad_score = grads[n / 2][n % 2];
          if (!kPlain && dropout != nullptr) {
            const Vec<float> factors = load(dropout + here);
            grad_score = kept * (dropped(load(grad + here), factors) - load(delta + column));
            kept = dropped(kept, factors);
          } else {
            grad_score = kept * (load(grad + here) - load(delta + column));
          }
          if (!kPlain && slopes != nullptr) grad_score *= load(slopes + here);
          p[n / 2][n % 2] = kept;
        }
        FASTLM_UNROLL for (int n = 0; n < 2; ++n) {
          store_two(probabilities + row + n * kTile + at, p[n][0], p[n][1]);
          store_two(grad_scores + row + n * kTile + at, grads[n][0], grads[n][1]);
          if constexpr (K::kPer == 2) put(pairs + row / 2 + at + n * kLane, paired(grads[0][n], grads[1][n]));
        }
      }
    }
  }

  void write_queries(const Sequence& sequence, int head, int first, int tile, int split, BwdSpace<K>& space) const {
    const int64_t width = paired_words(p_.head_dim);
    Workspace<uint32_t>& rows = space.natural;
    transpose_rows({reinterpret_cast<const uint32_t*>(space.grad_queries.row(tile)), kTile}, width, kTile, rows.row(0));
    for (int row = 0; row < smaller(sequence.queries - first, kTile); ++row) {
      const float* const from = reinterpret_cast<const float*>(rows.row(0)) + row * width;
      if (p_.splits == 1) {
        write_row(from, static_cast<float>(p_.scale), p_.head_dim, grad_query_row(sequence, head, first + row));
      } else {
        write_row(from, 1.0f, p_.head_dim, part_row(sequence, head, first + row, split));
      }
    }
  }
};

template <typename T>
const char* bwd(const AttentionBwdCpuParams& p) {
  using K = typename WordsOf<T>::type;
  const int64_t tasks = int64_t{p.sequences} * p.kv_heads * p.splits;
  const Backward<T> backward(p);
  const int64_t tiles = (int64_t{p.max_queries} + kTile - 1) / kTile * (p.heads / p.kv_heads);
  const int64_t work = int64_t{p.batch} * p.heads * p.queries * p.max_keys;
  bool failed = false;
#pragma omp parallel num_threads(threads_for_work(tasks, work))
  {
    BwdSpace<K> space(p, tiles);
    const TileConfig config;
    if (space.failed()) {
#pragma omp atomic write
      failed = true;
    }
#pragma omp barrier
    if (!failed) {
#pragma omp for schedule(dynamic)
      for (int64_t n = 0; n < tasks; ++n) backward.task(n, space);
      if (p.splits > 1 && p.grad_query != nullptr) {
#pragma omp for schedule(dynamic)
        for (int64_t n = 0; n < int64_t{p.sequences} * p.heads; ++n) backward.add_parts(n);
      }
    }
  }
  return failed ? kNoMemory : nullptr;
}

#define FASTLM_DISPATCH(function, p)                             \
  if (p.dtype == DType::kFloat32) return function<float>(p);     \
  if (p.dtype == DType::kBFloat16) return function<BFloat16>(p); \
  return p.dtype == DType::kFloat16 ? function<Half>(p) : "attention is of fp32, bf16 and fp16";

}  // namespace

namespace FASTLM_CPU_TARGET {

const char* attention_fwd_cpu(const AttentionFwdCpuParams& p) { FASTLM_DISPATCH(fwd, p) }
const char* attention_bwd_cpu(const AttentionBwdCpuParams& p) { FASTLM_DISPATCH(bwd, p) }

}  // namespace FASTLM_CPU_TARGET

#if FASTLM_CPU_BASELINE
FASTLM_CPU_DISPATCH(attention_fwd_cpu, AttentionFwdCpuParams)
FASTLM_CPU_DISPATCH(attention_bwd_cpu, AttentionBwdCpuParams)
#endif

}  // namespace fastlm
