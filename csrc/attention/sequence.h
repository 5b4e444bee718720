// Where a sequence's queries and keys lie, which of them see each other, and so which tiles meet. For CUDA and the CPU;
// with internal linkage, see common/simd.h.
#pragma once

#include "attention/attention.h"

namespace fastlm {
namespace {

FASTLM_HOST_DEVICE inline int smaller(int a, int b) { return a < b ? a : b; }
FASTLM_HOST_DEVICE inline int larger(int a, int b) { return a < b ? b : a; }

struct Tiles {
  int start, stop;

  FASTLM_HOST_DEVICE bool have(int tile) const { return tile >= start && tile < stop; }
};

// Tiles of `size` with any of low to high, of `count` places from 0.
FASTLM_HOST_DEVICE inline Tiles tiles_between(int low, int high, int count, int size) {
  low = larger(low, 0);
  high = smaller(high, count - 1);
  if (low > high) return {0, 0};
  return {low / size, high / size + 1};
}

class Sequence {
 public:
  int number, batch;
  int q_start, k_start;  // rows of the tensors
  int queries, keys;
  int offset;  // of the key that query 0 is at

  FASTLM_HOST_DEVICE Sequence(const AttentionProblem& p, int number) : number(number), left_(p.left), right_(p.right) {
    const bool packed = p.cu_seqlens_q != nullptr;
    batch = packed ? 0 : number;
    q_start = packed ? within(p.cu_seqlens_q[number], p.queries) : 0;
    k_start = packed ? within(p.cu_seqlens_k[number], p.keys) : 0;
    queries = packed ? within(p.cu_seqlens_q[number + 1], p.queries) - q_start : p.queries;
    keys = packed ? within(p.cu_seqlens_k[number + 1], p.keys) - k_start : p.keys;
    if (p.key_lengths != nullptr) keys = within(p.key_lengths[number], p.keys);
    offset = packed || p.key_lengths != nullptr ? keys - queries : 0;
  }

  FASTLM_HOST_DEVICE bool sees(int query, int key) const {
    return key < keys && key >= query + offset - left_ && key <= query + offset + right_;
  }

  // Keys that a query sees, if any: none where the last is before the first.
  FASTLM_HOST_DEVICE int first_seen(int query) const { return larger(query + offset - left_, 0); }
  FASTLM_HOST_DEVICE int last_seen(int query) const { return smaller(query + offset + right_, keys - 1); }
  FASTLM_HOST_DEVICE int first_to_see(int key) const { return larger(key - offset - right_, 0); }
  FASTLM_HOST_DEVICE int last_to_see(int key) const {
    return key < keys ? smaller(key - offset + left_, queries - 1) : -1;
  }

  // Tiles of keys of which any of these queries sees any, and the other way round: the same pairs.
  FASTLM_HOST_DEVICE Tiles seen_by(int first_query, int last_query, int size) const {
    return tiles_between(first_query + offset - left_, smaller(last_query, queries - 1) + offset + right_, keys, size);
  }
  FASTLM_HOST_DEVICE Tiles that_see(int first_key, int last_key, int size) const {
    if (first_key >= keys) return {0, 0};
    return tiles_between(first_key - offset - right_, smaller(last_key, keys - 1) - offset + left_, queries, size);
  }

  // Of these, those that they all see whole. Queries beyond the last one see what they like.
  FASTLM_HOST_DEVICE Tiles all_seen_by(int first_query, int last_query, int size) const {
    return {up(last_query + offset - left_, size), down(smaller(first_query + offset + right_ + 1, keys), size)};
  }
  FASTLM_HOST_DEVICE Tiles that_all_see(int first_key, int last_key, int size) const {
    if (last_key >= keys) return {0, 0};
    return {up(last_key - offset - right_, size), down(first_key - offset + left_ + 1, size)};
  }

  // Of a head of query, grad_output and the like; of key and value.
  template <typename T>
  FASTLM_HOST_DEVICE T* query_rows(T* tensor, const Four& strides, int head) const {
    return tensor + batch * strides.at[0] + head * strides.at[1] + q_start * strides.at[2];
  }
  template <typename T>
  FASTLM_HOST_DEVICE T* key_rows(T* tensor, const Four& strides, int head) const {
    return tensor + batch * strides.at[0] + head * strides.at[1] + k_start * strides.at[2];
  }

  // The number of query 0 among the rows of the log-sum-exp and of dropout.
  FASTLM_HOST_DEVICE int64_t row(const AttentionProblem& p, int head) const {
    return (int64_t{batch} * p.heads + head) * p.queries + q_start;
  }

 private:
  int left_, right_;

  FASTLM_HOST_DEVICE static int down(int x, int size) { return larger(x, 0) / size; }
  FASTLM_HOST_DEVICE static int up(int x, int size) { return (larger(x, 0) + size - 1) / size; }

  // A wrong length on the device must not make a kernel read out of bounds.
  FASTLM_HOST_DEVICE static int within(int x, int most) { return smaller(larger(x, 0), most); }
};

}  // namespace
}  // namespace fastlm
