// Where a sequence's queries and keys lie, which of them see each other, and so which tiles meet.
#pragma once

#include "attention/attention.h"

namespace fastlm {

struct Tiles {
  int start, stop;

  __device__ bool have(int tile) const { return tile >= start && tile < stop; }
};

// Tiles of `size` with any of low to high, of `count` places from 0.
__device__ inline Tiles tiles_between(int low, int high, int count, int size) {
  low = max(low, 0);
  high = min(high, count - 1);
  if (low > high) return {0, 0};
  return {low / size, high / size + 1};
}

class Sequence {
 public:
  int number, batch;
  int q_start, k_start;  // rows of the tensors
  int queries, keys;
  int offset;  // of the key that query 0 is at

  __device__ Sequence(const AttentionProblem& p, int number) : number(number), left_(p.left), right_(p.right) {
    const bool packed = p.cu_seqlens_q != nullptr;
    batch = packed ? 0 : number;
    q_start = packed ? within(p.cu_seqlens_q[number], p.queries) : 0;
    k_start = packed ? within(p.cu_seqlens_k[number], p.keys) : 0;
    queries = packed ? within(p.cu_seqlens_q[number + 1], p.queries) - q_start : p.queries;
    keys = packed ? within(p.cu_seqlens_k[number + 1], p.keys) - k_start : p.keys;
    if (p.key_lengths != nullptr) keys = within(p.key_lengths[number], p.keys);
    offset = packed || p.key_lengths != nullptr ? keys - queries : 0;
  }

  __device__ bool sees(int query, int key) const {
    return key < keys && key >= query + offset - left_ && key <= query + offset + right_;
  }

  // Tiles of keys of which any of these queries sees any, and the other way round: the same pairs.
  __device__ Tiles seen_by(int first_query, int last_query, int size) const {
    return tiles_between(first_query + offset - left_, min(last_query, queries - 1) + offset + right_, keys, size);
  }
  __device__ Tiles that_see(int first_key, int last_key, int size) const {
    if (first_key >= keys) return {0, 0};
    return tiles_between(first_key - offset - right_, min(last_key, keys - 1) - offset + left_, queries, size);
  }

  // Of these, those that they all see whole. Queries beyond the last one see what they like.
  __device__ Tiles all_seen_by(int first_query, int last_query, int size) const {
    return {up(last_query + offset - left_, size), down(min(first_query + offset + right_ + 1, keys), size)};
  }
  __device__ Tiles that_all_see(int first_key, int last_key, int size) const {
    if (last_key >= keys) return {0, 0};
    return {up(last_key - offset - right_, size), down(first_key - offset + left_ + 1, size)};
  }

  // Of a head of query, grad_output and the like; of key and value.
  template <typename T>
  __device__ T* query_rows(T* tensor, const Four& strides, int head) const {
    return tensor + batch * strides.at[0] + head * strides.at[1] + q_start * strides.at[2];
  }
  template <typename T>
  __device__ T* key_rows(T* tensor, const Four& strides, int head) const {
    return tensor + batch * strides.at[0] + head * strides.at[1] + k_start * strides.at[2];
  }

  // The number of query 0 among the rows of the log-sum-exp and of dropout.
  __device__ int64_t row(const AttentionProblem& p, int head) const {
    return (int64_t{batch} * p.heads + head) * p.queries + q_start;
  }

 private:
  int left_, right_;

  __device__ static int down(int x, int size) { return max(x, 0) / size; }
  __device__ static int up(int x, int size) { return (max(x, 0) + size - 1) / size; }

  // A wrong length on the device must not make a kernel read out of bounds.
  __device__ static int within(int x, int most) { return min(max(x, 0), most); }
};

}  // namespace fastlm
