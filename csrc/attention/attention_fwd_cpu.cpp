// Attention on the CPU, forward; equations in attention.h, products and the layouts they take in product_cpu.h.
//
// A thread takes a key head of a sequence, lays out its keys and values, and walks with blocks of queries over tiles of
// keys (online softmax: exponents are less by a base that is raised only when a score is far above it). Where registers
// hold a strip of scores, it becomes probabilities there.
//
// Bytes of memory to work in, for a thread: 4T(D + D_v) of T keys.
#include <cmath>

#include "attention/attention.h"
#include "attention/scores_cpu.h"

namespace fastlm {
namespace {

constexpr int kBlock = 48;      // rows of scores that meet one tile of keys after the other
constexpr int kFew = 4;         // rows for which keys and values are not laid out, but taken as they lie
constexpr float kSlack = 6.0f;  // by how much a score may be above the base of its row

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

// Raises the base to the largest score where one is far above it; returns by what was summed before is to be
// multiplied.
inline float raise_base(Vec<float> tops, float unit, Row& row) {
  if (!any(tops * unit - row.base > kSlack)) return 1.0f;  // it is, also above -inf, where nothing was seen yet
  const float top = largest<float>(tops) * unit;
  const float factor = exp2(broadcast<float>((row.base - top) * kLog2e))[0];
  row.total *= factor;
  row.base = top;
  return factor;
}

// Scores of kColumns vectors of each row to probabilities, and by what is to be multiplied what was summed before.
template <typename K, int kRows, int kColumns>
inline __attribute__((always_inline)) void exponentiate(Registers<kRows, kColumns>& s, float unit, const float* dropout,
                                                        Row* rows, uint32_t* probabilities, float* factors) {
  FASTLM_UNROLL for (int r = 0; r < kRows; ++r) {
    Vec<float> tops = broadcast<float>(-INFINITY);
    FASTLM_UNROLL for (int n = 0; n < kColumns; ++n) tops = max(s[r][n], tops);
    factors[r] = raise_base(tops, unit, rows[r]);
  }
  const Vec<float> units = broadcast<float>(unit * kUnits<K>);
  FASTLM_UNROLL for (int r = 0; r < kRows; ++r) {
    const Vec<float> less = broadcast<float>(rows[r].base == -INFINITY ? 0.0f : -rows[r].base * kUnits<K>);
    FASTLM_UNROLL for (int n = 0; n < kColumns; ++n) {
      s[r][n] = exponential<K>(s[r][n], units, less);
      rows[r].total += s[r][n];
      if (dropout != nullptr) s[r][n] = dropped(s[r][n], load(dropout + r * kTile + n * kLane));
    }
    store_row(s[r], reinterpret_cast<typename K::Element*>(probabilities + r * kTile / K::kPer));
  }
}

// A strip of queries and a tile of keys whose products are all there is to the scores.
struct Strip {
  First queries;
  Second keys;
  int64_t steps;
  float unit;
  const Span* seen;  // of each row, or null: all
  Row* rows;
  uint32_t* probabilities;
  float* factors;
};

template <typename K, int kColumns>
__attribute__((noinline)) void exponentiate_products(const Strip& strip) {
  Registers<K::kStrip, kColumns> s;
  product<K>(strip.queries, strip.keys, strip.steps, s);
  if (strip.seen != nullptr) hide(strip.seen, s);
  exponentiate<K>(s, strip.unit, nullptr, strip.rows, strip.probabilities, strip.factors);
}

// Products of a few rows of queries, laid out as floats up to a multiple of kLane, with `count` keys: to rows of kTile.
template <int kRows, typename T>
void multiply_keys(const RowsOf<T>& keys, int count, const float* queries, float* s) {
  const int64_t width = paired_words(keys.cols);
  for (int first = 0; first < count; first += kLane) {
    alignas(64) uint32_t sums[kRows][kLane * kLane] = {};  // of a key the sums of every kLane-th product
    for (int n = 0; n < smaller(count - first, kLane); ++n) {
      const T* const key = keys.at + (first + n) * keys.row;
      Registers<kRows, 1> sum = {};
      const auto add = [&](int64_t c, Vec<float> x) {
        FASTLM_UNROLL for (int r = 0; r < kRows; ++r) {
          sum[r][0] = fastlm::multiply_add(x, load(queries + r * width + c), sum[r][0]);
        }
      };
      int64_t c = 0;
      for (; c + kLane <= keys.cols; c += kLane) add(c, load(key + c));
      if (c < keys.cols) add(c, load(key + c, keys.cols - c));
      FASTLM_UNROLL for (int r = 0; r < kRows; ++r) put(sums[r] + n * kLane, sum[r][0]);
    }
    for (int r = 0; r < kRows; ++r) {
      transpose(sums[r], kLane, sums[r], kLane);
      Vec<float> total = {};
      for (int n = 0; n < kLane; ++n) total += get<Vec<float>>(sums[r] + n * kLane);
      store(s + r * kTile + first, total);
    }
  }
}

// output += p values, of kColumns vectors from a column on; of one that may be the last in part.
template <int kRows, int kColumns, typename T>
void add_values(const RowsOf<T>& values, int count, const float* p, int64_t column, float* output) {
  const int64_t width = paired_words(values.cols), left = values.cols - column;
  Registers<kRows, kColumns> sums = {};
  for (int n = 0; n < count; ++n) {
    const T* const value = values.at + n * values.row + column;
    Vec<float> row[kColumns];
    FASTLM_UNROLL for (int c = 0; c < kColumns; ++c) row[c] =
        kColumns == 1 ? load(value, left) : load(value + c * kLane);
    FASTLM_UNROLL for (int r = 0; r < kRows; ++r) {
      const Vec<float> factor = broadcast<float>(p[r * kTile + n]);
      FASTLM_UNROLL for (int c = 0; c < kColumns; ++c) sums[r][c] = fastlm::multiply_add(row[c], factor, sums[r][c]);
    }
  }
  FASTLM_UNROLL for (int r = 0; r < kRows; ++r) {
    FASTLM_UNROLL for (int c = 0; c < kColumns; ++c) {
      float* const to = output + r * width + column + c * kLane;
      store(to, load(to) + sums[r][c]);
    }
  }
}

template <typename T>
class Forward {
  using K = typename WordsOf<T>::type;
  using P = AttentionFwdCpuParams;

 public:
  Forward(const P& p, int chunks)
      : p_(p),
        scores_(p, p),
        chunks_(chunks),
        simple_(kInRegisters<K> && !scores_.general() && p.rng_state == nullptr &&
                steps_of<K>(p.head_dim) <= kChain<K>) {}

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
    if (rows > kFew) lay_out(sequence, kv_head, own, space);
    for (int n = chunk; n < blocks * heads; n += chunks_) {
      const int first = n % blocks * kBlock;
      block(sequence, first_head + n / blocks, first, smaller(rows - first, kBlock), rows > kFew, own, split, space);
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
  bool simple_;  // whether scores become probabilities in registers

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

  void block(const Sequence& sequence, int head, int first, int count, bool laid_out, const Tiles& own, int split,
             FwdSpace<K>& space) const {
    Place places[kBlock];
    Row rows[kBlock];
    for (int r = 0; r < count; ++r) {
      const int of = p_.grouped ? head + (first + r) / sequence.queries : head;
      const int query = p_.grouped ? (first + r) % sequence.queries : first + r;
      places[r] = {of, query, sequence.row(p_, of) + query};
      rows[r].base = -INFINITY, rows[r].total = Vec<float>{};
    }
    const int64_t width = paired_words(p_.value_dim);
    memset(space.output.row(0), 0, count * width * sizeof(float));
    const int first_query = p_.grouped ? 0 : first, last_query = p_.grouped ? sequence.queries - 1 : first + count - 1;
    const Tiles seen = sequence.seen_by(first_query, last_query, kTile);
    const Tiles whole = sequence.all_seen_by(first_query, last_query, kTile);
    const Tiles tiles = {larger(seen.start, own.start), smaller(seen.stop, own.stop)};
    if (laid_out) {
      walk(sequence, places, count, tiles, whole, own.start, rows, space);
    } else {
      const auto walk_in_place = count == 4   ? &Forward::walk_in_place<4>
                                 : count == 3 ? &Forward::walk_in_place<3>
                                 : count == 2 ? &Forward::walk_in_place<2>
                                              : &Forward::walk_in_place<1>;
      (this->*walk_in_place)(sequence, places, tiles, whole, rows, space);
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

  void walk(const Sequence& sequence, const Place* places, int count, const Tiles& tiles, const Tiles& whole,
            int first_tile, Row* rows, FwdSpace<K>& space) const {
    const int64_t width = paired_words(p_.value_dim);
    float factors[kBlock];
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
    for (int tile = tiles.start; tile < tiles.stop; ++tile) {
      int cols[kBlock];  // of a strip, of those keys that any of its rows sees
      for (int r = 0, strip; r < count; r += strip) {
        strip = strip_of<K>(count - r);
        const int here = smaller(strip, count - r);
        const First left = {queries.at + r * queries.row, queries.row};
        const Second right = {space.keys.row(tile - first_tile), kTile};
        cols[r] = strip_meets(sequence, places + r, here, tile * kTile, whole.have(tile), left, right, rows + r,
                              space.probabilities.row(r), factors + r);
        if (cols[r] == 0) continue;
        for (int n = r; n < r + here; ++n) {
          if (factors[n] != 1.0f) write_row(space.output.row(n), factors[n], width, space.output.row(n));
        }
      }
      for (int r = 0, strip; r < count; r += strip) {
        strip = strip_of<K>(count - r);
        if (cols[r] == 0) continue;
        multiply_all<K>(strip, width, {space.output.row(r), width, false},
                        {space.probabilities.row(r), kTile / K::kPer}, {space.values.row(tile - first_tile), width},
                        steps_of<K>(cols[r]));
      }
    }
  }

  // A strip of `count` queries with a tile of keys, `all` of which they see or some: to probabilities, of so many keys.
  int strip_meets(const Sequence& sequence, const Place* places, int count, int first_key, bool all,
                  const First& queries, const Second& keys, Row* rows, uint32_t* probabilities, float* factors) const {
    const int64_t steps = steps_of<K>(p_.head_dim);
    Span seen[K::kStrip];
    int cols = all ? kTile : 0;
    for (int n = 0; !all && n < count; ++n) {
      seen[n] = Scores::seen_in(sequence, {places[n].head, places[n].query, first_key, true, 0});
      cols = larger(cols, smaller(seen[n].stop, kTile));
    }
    if (cols == 0) return 0;
    if constexpr (kInRegisters<K>) {
      if (simple_ && count == K::kStrip) {
        const Strip strip = {queries, keys, steps, scores_.unit, all ? nullptr : seen, rows, probabilities, factors};
        (cols > 3 * kLane   ? exponentiate_products<K, 4>
         : cols > 2 * kLane ? exponentiate_products<K, 3>
         : cols > kLane     ? exponentiate_products<K, 2>
                            : exponentiate_products<K, 1>)(strip);
        return cols;
      }
    }
    alignas(64) float s[K::kStrip * kTile];
    multiply_all<K>(strip_of<K>(count), wide<K>(cols), {s, kTile, true}, queries, keys, steps);
    for (int n = 0; n < count; ++n) {
      finish_row<K>(sequence, places[n], first_key, all, cols, s + n * kTile, rows[n],
                    probabilities + n * kTile / K::kPer, factors[n]);
    }
    return cols;
  }

  // Products of a row with `cols` keys to probabilities, in words of W.
  template <typename W>
  void finish_row(const Sequence& sequence, const Place& place, int first_key, bool all, int cols, float* s, Row& row,
                  uint32_t* probabilities, float& factor) const {
    alignas(64) float dropout[kDropoutColumns];
    if (!all || scores_.general()) {
      const int keys = smaller(sequence.keys - first_key, kTile);
      scores_.finish(sequence, {place.head, place.query, first_key, true, keys}, wide<W>(cols), s, nullptr);
    }
    for (int at = wide<W>(cols); at < kTile; at += kLane) store(s + at, broadcast<float>(-INFINITY));
    if (p_.rng_state != nullptr) dropout_factors(p_.dropout_p, p_.rng_state, place.number, first_key, dropout);
    Registers<1, kTile / kLane> scores;
    load_row(s, scores[0]);
    exponentiate<W>(scores, scores_.unit, p_.rng_state == nullptr ? nullptr : dropout, &row, probabilities, &factor);
  }

  // A few rows with keys and values where they lie.
  template <int kRows>
  void walk_in_place(const Sequence& sequence, const Place* places, const Tiles& tiles, const Tiles& whole, Row* rows,
                     FwdSpace<K>& space) const {
    const int kv_head = places[0].head / (p_.heads / p_.kv_heads);
    const auto keys = key_rows<T>(sequence, p_.key, p_.key_strides, kv_head, p_.head_dim);
    const auto values = key_rows<T>(sequence, p_.value, p_.value_strides, kv_head, p_.value_dim);
    const int64_t width = paired_words(p_.head_dim), value_width = paired_words(p_.value_dim);
    float* const queries = reinterpret_cast<float*>(space.query.row(0));
    for (int r = 0; r < kRows; ++r) {
      const auto source = query_rows<T>(sequence, p_.query, p_.query_strides, places[r].head, p_.head_dim);
      const T* const row = from_row(source, places[r].query).at;
      for (int64_t c = 0; c < width; c += kLane) store(queries + r * width + c, load(row + c, p_.head_dim - c));
    }
    alignas(64) float s[kRows * kTile], p[kRows * kTile];
    for (int tile = tiles.start; tile < tiles.stop; ++tile) {
      const int first_key = tile * kTile, count = smaller(sequence.keys - first_key, kTile);
      multiply_keys<kRows>(from_row(keys, first_key), count, queries, s);
      for (int r = 0; r < kRows; ++r) {
        float factor, *const output = space.output.row(r);
        finish_row<Floats>(sequence, places[r], first_key, whole.have(tile), count, s + r * kTile, rows[r],
                           reinterpret_cast<uint32_t*>(p + r * kTile), factor);
        if (factor != 1.0f) write_row(output, factor, value_width, output);
      }
      for (int64_t c = 0, vectors; c < value_width; c += vectors * kLane) {
        vectors = p_.value_dim - c >= 4 * kLane ? 4 : 1;
        (vectors == 4 ? add_values<kRows, 4, T> : add_values<kRows, 1, T>)(from_row(values, first_key), count, p, c,
                                                                           space.output.row(0));
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
  const int64_t tiles = (int64_t{p.max_keys} + kTile - 1) / kTile, rows = int64_t{p.batch} * p.heads * p.queries;
  const Forward<T> forward(p, chunks);
  const auto tasks = [&](FwdSpace<K>& space) {
#pragma omp for schedule(dynamic)
    for (int64_t n = 0; n < units * chunks; ++n) forward.task(n, space);
    if (p.parts == nullptr) return;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) forward.combine(row);
  };
  const bool laid_out = p.max_queries * (p.grouped ? group : 1) > kFew;
  return in_parallel<FwdSpace<K>>(threads_for(units * chunks, rows * p.max_keys), tasks, p,
                                  laid_out ? (tiles + p.splits - 1) / p.splits : 1);
}

}  // namespace

namespace FASTLM_CPU_TARGET {

const char* attention_fwd_cpu(const AttentionFwdCpuParams& p) { FASTLM_DISPATCH(fwd, p) }

}  // namespace FASTLM_CPU_TARGET

#if FASTLM_CPU_BASELINE
FASTLM_CPU_DISPATCH(attention_fwd_cpu, AttentionFwdCpuParams)
#endif

}  // namespace fastlm
