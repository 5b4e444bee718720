// Launchers of scaled dot-product attention in bf16 and fp16, over batches and over packed sequences, for CUDA.
//
//   s      = scale * query . key,  softcap * tanh(s / softcap),  - slope * |i + offset - j|
//   lse    = log(sum_j(exp(s))),  p = exp(s - lse)                over the keys that query i sees
//   output = dropout(p) value
//
//   delta      = sum(grad_output * output)
//   grad_s     = p * (dropout(grad_output value^T) - delta) * (1 - (s / softcap)^2)
//   grad_query = scale * grad_s key,  grad_key = scale * grad_s^T query,  grad_value = dropout(p)^T grad_output
//
// Query i sees key j if i + offset - left <= j <= i + offset + right and j is one of the sequence's. offset is 0 in a
// batch; with key_lengths or cu_seqlens it puts the last query at the last key. A query that sees no key gives 0, lse
// -inf and no gradients.
//
// Of tensors of rows the rows are one run each and begin at multiples of 16 bytes; head dimensions are multiples of 8.
// Packed sequences are a batch of one. T is the dtype. A launcher returns null, or what is wrong. No dimension is 0 but
// T_k.
//
// Source: Dao 2023 (arXiv 2307.08691); Milakov and Gimelshein 2018 (arXiv 1805.02867); Press et al. 2021 (arXiv
// 2108.12409) for ALiBi; Dao et al. 2023, "Flash-Decoding for long-context inference".
#pragma once

#include <cstdint>
#include <tuple>

#include "common/cpu_target.h"
#include "common/dtype.h"
#include "common/rows.h"

namespace fastlm {

constexpr int kMaxQueryTile = 64;  // queries of a tile in backward

struct AttentionProblem {
  const void* query;          // [B, H, T_q, D] T
  const void* key;            // [B, H_kv, T_k, D] T
  const void* value;          // [B, H_kv, T_k, D_v] T
  const float* alibi_slopes;  // [sequences, H], or null
  const int* key_lengths;     // [B], or null: T_k
  const int* cu_seqlens_q;    // [sequences + 1], or null: every element of the batch is a sequence
  const int* cu_seqlens_k;
  const int64_t* rng_state;  // [2] seed and offset, or null: no dropout
  Four query_strides, key_strides, value_strides;
  int batch, sequences, heads, kv_heads;
  int queries, keys;          // T_q and T_k
  int max_queries, max_keys;  // of the longest sequence
  int head_dim, value_dim;
  int left, right;  // at most 2^30, which is open: no sequence is as long
  double scale, softcap, dropout_p;
  DType dtype;

  using P = AttentionProblem;
  static constexpr auto fields() {
    return std::make_tuple(&P::query, &P::key, &P::value, &P::alibi_slopes, &P::key_lengths, &P::cu_seqlens_q,
                           &P::cu_seqlens_k, &P::rng_state, &P::query_strides, &P::key_strides, &P::value_strides,
                           &P::batch, &P::sequences, &P::heads, &P::kv_heads, &P::queries, &P::keys, &P::max_queries,
                           &P::max_keys, &P::head_dim, &P::value_dim, &P::left, &P::right, &P::scale, &P::softcap,
                           &P::dropout_p, &P::dtype);
  }
};

struct AttentionFwdParams : AttentionProblem {
  void* output;     // [B, H, T_q, D_v] T
  float* lse;       // [B, H, T_q]
  float* parts;     // [splits, B, H, T_q, D_v] outputs of parts of the keys, or null: one part
  float* part_lse;  // [splits, B, H, T_q]
  Four output_strides;
  int splits;
  bool grouped;  // a tile's rows are the queries of all heads that share a key head

  using P = AttentionFwdParams;
  static constexpr auto fields() {
    return std::tuple_cat(AttentionProblem::fields(), std::make_tuple(&P::output, &P::lse, &P::parts, &P::part_lse,
                                                                      &P::output_strides, &P::splits, &P::grouped));
  }
};

struct AttentionBwdParams : AttentionProblem {
  const void* grad_output;  // [B, H, T_q, D_v] T
  const void* output;       // [B, H, T_q, D_v] T
  const float* lse;         // [B, H, T_q]
  float* stats;             // [2, B, H, T_q], filled: -lse in units of log2, -inf for one of -inf, and delta
  float* partial;           // [splits, H, B * T_q + kMaxQueryTile * (sequences + 1), D or D_v rounded up to 32]
  void* grad_query;         // [B, H, T_q, D] T, or null, with partial
  void* grad_key;           // [B, H_kv, T_k, D] T, or null
  void* grad_value;         // [B, H_kv, T_k, D_v] T, or null
  Four grad_output_strides, output_strides, grad_query_strides, grad_key_strides, grad_value_strides;
  int splits;

  using P = AttentionBwdParams;
  static constexpr auto fields() {
    return std::tuple_cat(
        AttentionProblem::fields(),
        std::make_tuple(&P::grad_output, &P::output, &P::lse, &P::stats, &P::partial, &P::grad_query, &P::grad_key,
                        &P::grad_value, &P::grad_output_strides, &P::output_strides, &P::grad_query_strides,
                        &P::grad_key_strides, &P::grad_value_strides, &P::splits));
  }
};

const char* attention_fwd(const AttentionFwdParams& params, int device, void* stream);
const char* attention_bwd(const AttentionBwdParams& params, int device, void* stream);

// The CPU's take fp32 too, rows that begin anywhere, and a mask.
struct AttentionMask {
  const void* mask;  // [B, H, T_q, T_k], added to scores, or bool: what takes part; or null
  Four mask_strides;
  DType mask_dtype;
  bool boolean;

  template <typename P>
  static constexpr auto fields() {
    return std::make_tuple(&P::mask, &P::mask_strides, &P::mask_dtype, &P::boolean);
  }
};

struct AttentionFwdCpuParams : AttentionFwdParams, AttentionMask {
  static constexpr auto fields() {
    return std::tuple_cat(AttentionFwdParams::fields(), AttentionMask::fields<AttentionFwdCpuParams>());
  }
};

struct AttentionBwdCpuParams : AttentionBwdParams, AttentionMask {
  static constexpr auto fields() {
    return std::tuple_cat(AttentionBwdParams::fields(), AttentionMask::fields<AttentionBwdCpuParams>());
  }
};

FASTLM_CPU_LAUNCHER(attention_fwd_cpu, AttentionFwdCpuParams)
FASTLM_CPU_LAUNCHER(attention_bwd_cpu, AttentionBwdCpuParams)

}  // namespace fastlm
