// Attention on the CPU, backward; equations in attention.h, products and the layouts they take in product_cpu.h.
//
// A thread takes a key head of a sequence, or a part of its keys, lays out the queries that share it, and walks with
// tiles of keys over runs of queries. Where registers hold a strip of scores, it becomes probabilities and gradients
// there. What a tile adds to the gradient of queries goes to a sum in fp32; where the keys are in several parts, of
// which there are as many as their number asks for, whatever the number of threads, the sums are added in order. So the
// result does not depend on the number of threads. Five products, as in the equations.
//
// Bytes of memory to work in, for a thread: 12T(D + D_v) of T queries of all heads that share a key head.
#include <cmath>

#include "attention/attention.h"
#include "attention/scores_cpu.h"

namespace fastlm {
namespace {

constexpr int kRun = 2 * kTile;  // queries that meet a tile of keys together: more terms in a sum, fewer sums of sums

template <typename K>
struct BwdSpace {
  // Of tiles of queries and their gradients of output, one head of the group after the other.
  Workspace<uint32_t> queries, query_pairs, grads, grad_pairs;
  Workspace<float> less, delta;
  Workspace<float> grad_queries;  // transposed
  // Of a tile of keys.
  Workspace<uint32_t> natural, key, value, key_columns;
  Workspace<float> grad_key, grad_value;
  // Of a tile of keys and a run of queries, keys along the rows.
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
        probabilities(kTile, kRun / K::kPer),
        grad_scores(kTile, kRun / K::kPer),
        grad_score_pairs(kTile / K::kPer, kRun),
        dropout(kTile, kTile),
        dropout_rows(kTile, kTile) {}

  bool failed() const {
    return queries.failed() || query_pairs.failed() || grads.failed() || grad_pairs.failed() || less.failed() ||
           delta.failed() || grad_queries.failed() || natural.failed() || key.failed() || value.failed() ||
           key_columns.failed() || grad_key.failed() || grad_value.failed() || probabilities.failed() ||
           grad_scores.failed() || grad_score_pairs.failed() || dropout.failed() || dropout_rows.failed();
  }
};

// Where probabilities and gradients of scores go, and what they are of: a strip of keys and a tile of queries.
template <typename K>
struct Derivatives {
  float unit;
  const float *less, *delta;                         // of each query
  typename K::Element *probabilities, *grad_scores;  // rows of keys, of kRun
  uint32_t* pairs;                                   // the latter as paired words, of kRun too
};

// Scores to probabilities, in rows of kTile.
template <typename K, int kRows, int kColumns>
inline __attribute__((always_inline)) void exponentiate(Registers<kRows, kColumns>& s, float unit, const float* less,
                                                        float* p) {
  const Vec<float> units = broadcast<float>(unit * kUnits<K>);
  FASTLM_UNROLL for (int r = 0; r < kRows; ++r) {
    FASTLM_UNROLL for (int n = 0; n < kColumns; ++n) {
      store(p + r * kTile + n * kLane, exponential<K>(s[r][n], units, load(less + n * kLane)));
    }
  }
}

// Gradients of probabilities to gradients of scores; both and what is kept of the probabilities in words.
template <typename K, int kRows, int kColumns>
inline __attribute__((always_inline)) void differentiate(Registers<kRows, kColumns>& grad, const float* p,
                                                         const float* dropout, const float* slopes,
                                                         const Derivatives<K>& to) {
  FASTLM_UNROLL for (int r = 0; r < kRows; ++r) {
    Registers<1, kColumns> kept;
    FASTLM_UNROLL for (int n = 0; n < kColumns; ++n) {
      const int at = r * kTile + n * kLane;
      Vec<float> probability = load(p + at), upstream = grad[r][n];
      kept[0][n] = probability;
      if (dropout != nullptr) {
        const Vec<float> factors = load(dropout + at);
        upstream = dropped(upstream, factors);
        kept[0][n] = dropped(probability, factors);
      }
      grad[r][n] = probability * (upstream - load(to.delta + n * kLane));
      if (slopes != nullptr) grad[r][n] *= load(slopes + at);
    }
    store_row(kept[0], to.probabilities + r * kRun);
    store_row(grad[r], to.grad_scores + r * kRun);
  }
  if constexpr (K::kPer == 2) {
    FASTLM_UNROLL for (int r = 0; r < kRows; r += 2) {
      FASTLM_UNROLL for (int n = 0; n < kColumns; ++n) {
        put(to.pairs + r / 2 * kRun + n * kLane, paired(grad[r][n], grad[r + 1][n]));
      }
    }
  }
}

// A strip of keys and a tile of queries whose products are all there is to the scores.
template <typename K>
struct Strip {
  First keys, values;
  Second queries, grads;
  int64_t steps, value_steps;
  const Span* seen;  // of each row, or null: all
  Derivatives<K> to;
};

template <typename K, int kRows, int kColumns>
__attribute__((noinline)) void differentiate_products(const Strip<K>& strip) {
  alignas(64) float p[kRows * kTile];
  Registers<kRows, kColumns> s;
  product<K>(strip.keys, strip.queries, strip.steps, s);
  if (strip.seen != nullptr) hide(strip.seen, s);
  exponentiate<K>(s, strip.to.unit, strip.to.less, p);
  product<K>(strip.values, strip.grads, strip.value_steps, s);
  differentiate<K>(s, p, nullptr, nullptr, strip.to);
}

template <typename K, int kRows>
void differentiate_columns(int columns, const Strip<K>& strip) {
  (columns == 4 * kLane   ? differentiate_products<K, kRows, 4>
   : columns == 3 * kLane ? differentiate_products<K, kRows, 3>
   : columns == 2 * kLane ? differentiate_products<K, kRows, 2>
                          : differentiate_products<K, kRows, 1>)(strip);
}

template <typename T>
class Backward {
  using K = typename WordsOf<T>::type;
  using P = AttentionBwdCpuParams;

 public:
  explicit Backward(const P& p)
      : p_(p),
        scores_(p, p),
        simple_(kInRegisters<K> && !scores_.general() && p.rng_state == nullptr &&
                larger(p.head_dim, p.value_dim) <= kChain<K> * K::kPer) {}

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
        for (int tile = that_see.start; tile < that_see.stop; tile += kRun / kTile) {
          const int run = smaller(that_see.stop - tile, kRun / kTile);
          run_meets(sequence, kv_head * group + n, tile * kTile, n * tiles + tile, run, first_key, laid_out, space);
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
  bool simple_;  // whether scores become gradients in registers

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
    if constexpr (K::kRows == 1) {
      transpose_rows(output, kTile, natural_words<K>(p_.value_dim), space.value.row(0));
      multiply_rows<K>(space.value.row(0), space.grads.row(tile), steps_of<K>(p_.value_dim), space.delta.row(tile));
    }
    for (int row = 0; K::kRows > 1 && row < kTile; row += K::kRows) {  // all products of sixteen rows
      alignas(64) float products[K::kRows * kLane];
      multiply_all<K>(K::kRows, kLane, {products, kLane, true}, {output.at + row * output.row, output.row},
                      {space.grads.row(tile) + row, kTile}, steps_of<K>(p_.value_dim));
      for (int n = 0; n < K::kRows; ++n) space.delta.row(tile)[row + n] = products[n * kLane + n];
    }
    const float* const lse = p_.lse + sequence.row(p_, head) + first;
    for (int row = 0; row < kTile; ++row) {  // of a query that sees nothing all is 0
      space.less.row(tile)[row] = row < count && lse[row] != -INFINITY ? -lse[row] * kUnits<K> : -INFINITY;
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

  // The tile of keys that is laid out with `run` tiles of queries, from number `tile` on of those laid out.
  void run_meets(const Sequence& sequence, int head, int first, int tile, int run, int first_key, const Keys& keys,
                 BwdSpace<K>& space) const {
    Span spans[kTile];  // of queries of the run, for each strip of keys
    const Tiles all_see = sequence.that_all_see(first_key, first_key + kTile - 1, kTile);
    const bool whole = all_see.have(first / kTile) && all_see.have(first / kTile + run - 1);
    for (int key = 0, strip; key < kTile; key += strip) {
      strip = strip_of<K>(kTile - key);
      spans[key] = {0, run * kTile};
      if (whole) continue;
      const int low_key = first_key + key, high_key = smaller(low_key + strip, sequence.keys) - 1;
      const int from = sequence.first_to_see(low_key) - first, to = sequence.last_to_see(high_key) + 1 - first;
      spans[key].start = larger(from, 0) / wide<K>(1) * wide<K>(1);
      spans[key].stop = low_key > high_key ? 0 : smaller(wide<K>(to), run * kTile);
    }
    for (int n = 0; n < run; ++n) {
      if (p_.rng_state != nullptr) lay_out_dropout(sequence, head, first + n * kTile, first_key, space);
      for (int key = 0, strip; key < kTile; key += strip) {
        strip = strip_of<K>(kTile - key);
        const Span here = {larger(spans[key].start - n * kTile, 0), smaller(spans[key].stop - n * kTile, kTile)};
        strip_meets(sequence, head, first, tile, n, first_key, key, here, whole, keys, space);
      }
    }
    // One product for all strips after the other: what is common to them stays in the nearest cache.
    const auto add = [&](Workspace<float>& to, int64_t cols, Workspace<uint32_t>& by, const uint32_t* with) {
      for (int key = 0, strip; key < kTile; key += strip) {
        strip = strip_of<K>(kTile - key);
        if (!spans[key].some()) continue;
        const int64_t skip = spans[key].start / K::kPer;
        multiply_all<K>(strip, cols, {to.row(key), cols, false}, {by.row(key) + skip, kRun / K::kPer},
                        {with + skip * cols, cols}, steps_of<K>(spans[key].count()));
      }
    };
    if (p_.grad_value != nullptr) {
      add(space.grad_value, paired_words(p_.value_dim), space.probabilities, space.grad_pairs.row(tile));
    }
    if (p_.grad_key != nullptr) {
      add(space.grad_key, paired_words(p_.head_dim), space.grad_scores, space.query_pairs.row(tile));
    }
    const uint32_t* const pairs = K::kPer == 1 ? space.grad_scores.row(0) : space.grad_score_pairs.row(0);
    for (int n = 0; p_.grad_query != nullptr && n < run; ++n) {
      multiply_all<K>(p_.head_dim, kTile, {space.grad_queries.row(tile + n), kTile, false},
                      {space.key_columns.row(0), kTile / K::kPer}, {pairs + n * kTile, kRun}, steps_of<K>(kTile));
    }
  }

  void lay_out_dropout(const Sequence& sequence, int head, int first, int first_key, BwdSpace<K>& space) const {
    const int64_t row = sequence.row(p_, head) + first;
    for (int n = 0; n < kTile; ++n) {
      dropout_factors(p_.dropout_p, p_.rng_state, row + n, first_key, space.dropout_rows.row(n));
    }
    transpose_rows({reinterpret_cast<const uint32_t*>(space.dropout_rows.row(0)), kTile}, kTile, kTile,
                   reinterpret_cast<uint32_t*>(space.dropout.row(0)));
  }

  // A strip of keys with tile n of a run of queries, of which it sees the span: to probabilities and gradients of
  // scores; zeros where there are none.
  void strip_meets(const Sequence& sequence, int head, int first, int tile, int n, int first_key, int key,
                   const Span& span, bool all, const Keys& keys, BwdSpace<K>& space) const {
    using Element = typename K::Element;
    const int strip = strip_of<K>(kTile - key), low_key = first_key + key;
    const int at = n * kTile + span.start, query = first + at;  // where the span begins
    if (span.count() < kTile) {                                 // the product with keys takes whole tiles
      uint32_t* const rows = K::kPer == 1 ? space.grad_scores.row(key) : space.grad_score_pairs.row(key / 2);
      for (int r = 0; r < strip / K::kPer; ++r) memset(rows + r * kRun + n * kTile, 0, kTile * sizeof(uint32_t));
    }
    if (!span.some()) return;

    if (!all) {
      const Tiles whole = sequence.that_all_see(low_key, low_key + strip - 1, 1);
      all = whole.have(query) && whole.have(smaller(query + span.count(), sequence.queries) - 1);
    }
    const First key_rows = {keys.key.at + key * keys.key.row, keys.key.row};
    const First value_rows = {keys.value.at + key * keys.value.row, keys.value.row};
    const Second queries = {space.queries.row(tile + n) + span.start, kTile};
    const Second grads = {space.grads.row(tile + n) + span.start, kTile};
    const int64_t steps = steps_of<K>(p_.head_dim), value_steps = steps_of<K>(p_.value_dim);
    Derivatives<K> to = {scores_.unit,
                         space.less.row(tile + n) + span.start,
                         space.delta.row(tile + n) + span.start,
                         reinterpret_cast<Element*>(space.probabilities.row(key)) + at,
                         reinterpret_cast<Element*>(space.grad_scores.row(key)) + at,
                         space.grad_score_pairs.row(key / 2) + at};
    if constexpr (kInRegisters<K>) {
      if (simple_) {
        Span seen[K::kStrip];
        for (int r = 0; !all && r < strip; ++r) {
          seen[r] = Scores::seen_in(sequence, {head, query, low_key + r, false, 0});
        }
        const Strip<K> with = {key_rows, value_rows, queries, grads, steps, value_steps, all ? nullptr : seen, to};
        return strip == 6 ? differentiate_columns<K, 6>(span.count(), with)
                          : differentiate_columns<K, 4>(span.count(), with);
      }
    }
    alignas(64) float s[K::kStrip * kTile], grad[K::kStrip * kTile], slopes[K::kStrip * kTile];
    multiply_all<K>(strip, span.count(), {s, kTile, true}, key_rows, queries, steps);
    multiply_all<K>(strip, span.count(), {grad, kTile, true}, value_rows, grads, value_steps);
    const int last = smaller(query + span.count(), sequence.queries);
    for (int r = 0; r < strip; ++r) {
      if (all && !scores_.general()) break;
      const int count = low_key + r < sequence.keys ? last - query : 0;
      scores_.finish(sequence, {head, query, low_key + r, false, count}, span.count(), s + r * kTile,
                     slopes + r * kTile);
    }
    for (int r = 0; r < strip; r += 2) {
      constexpr int kColumns = K::kRows > 1 ? 2 : 1;
      for (int column = 0; column < span.count(); column += kColumns * kLane) {
        const int place = r * kTile + column;
        Registers<2, kColumns> row;
        load_row(s + place, row[0]), load_row(s + place + kTile, row[1]);
        exponentiate<K>(row, scores_.unit, to.less + column, s + place);
        load_row(grad + place, row[0]), load_row(grad + place + kTile, row[1]);
        const float* const factors = space.dropout.row(key + r) + span.start + column;
        differentiate<K>(row, s + place, p_.rng_state == nullptr ? nullptr : factors,
                         scores_.capped() ? slopes + place : nullptr,
                         {to.unit, to.less + column, to.delta + column, to.probabilities + r * kRun + column,
                          to.grad_scores + r * kRun + column, to.pairs + r / 2 * kRun + column});
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
  const int64_t count = int64_t{p.sequences} * p.kv_heads * p.splits, rows = int64_t{p.batch} * p.heads * p.queries;
  const int64_t tiles = (int64_t{p.max_queries} + kTile - 1) / kTile * (p.heads / p.kv_heads);
  const Backward<T> backward(p);
  const auto tasks = [&](BwdSpace<K>& space) {
#pragma omp for schedule(dynamic)
    for (int64_t n = 0; n < count; ++n) backward.task(n, space);
    if (p.splits == 1 || p.grad_query == nullptr) return;
#pragma omp for schedule(dynamic)
    for (int64_t n = 0; n < int64_t{p.sequences} * p.heads; ++n) backward.add_parts(n);
  };
  return in_parallel<BwdSpace<K>>(threads_for(count, rows * p.max_keys), tasks, p, tiles);
}

}  // namespace

namespace FASTLM_CPU_TARGET {

const char* attention_bwd_cpu(const AttentionBwdCpuParams& p) { FASTLM_DISPATCH(bwd, p) }

}  // namespace FASTLM_CPU_TARGET

#if FASTLM_CPU_BASELINE
FASTLM_CPU_DISPATCH(attention_bwd_cpu, AttentionBwdCpuParams)
#endif

}  // namespace fastlm
