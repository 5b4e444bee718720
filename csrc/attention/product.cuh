// Products of matrices by a warp, on tensor cores: fp32 fragments in registers (device.cuh has who holds what), the
// first factor 16-bit fragments, the second a tile in shared memory.
#pragma once

#include "attention/tile.cuh"

namespace fastlm {

template <typename T>
__device__ uint32_t pack(float low, float high);
template <>
__device__ inline uint32_t pack<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&two);
}
template <>
__device__ inline uint32_t pack<__half>(float low, float high) {
  const __half2 two = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&two);
}

template <int M, int N>
__device__ void set(float (&d)[M][N][4], float x) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) d[m][n][e] = x;
    }
  }
}

// The fragments of a result as those of a first factor.
template <typename T, int M, int N>
__device__ void pack_all(const float (&d)[M][N][4], uint32_t (&a)[M][N / 2][4]) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        a[m][n / 2][n % 2 * 2 + half] = pack<T>(d[m][n][half * 2], d[m][n][half * 2 + 1]);
      }
    }
  }
}

// M * 16 rows of a tile, all of its columns, as a first factor; `place` is the lane's in the first 16, by Tile::down.
template <int kWidth, int M>
__device__ void load_rows(uint32_t (&a)[M][kWidth / 16][4], const unsigned char* shared, int place) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int k = 0; k < kWidth / 16; ++k) ldmatrix<4>(a[m][k], shared + Tile<kWidth>::moved(place, m * 16, k * 2));
  }
}

// Columns n and n + 1, by eights, of d: two fragments of the second factor.
template <typename T, int M, int N>
__device__ void multiply_two(float (&d)[M][N][4], int n, const uint32_t (&left)[M][4], const uint32_t (&right)[4]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t b[2] = {right[i * 2], right[i * 2 + 1]};
#pragma unroll
    for (int m = 0; m < M; ++m) mma_16816<T>(d[m][n + i], left[m], b);
  }
}

// d += a b^T for N * 8 rows b of a tile; `place` is the lane's, by Tile::along. a(k, fragments) gives columns 16 k to
// 16 k + 15 of the first factor.
template <typename T, int kWidth, int M, int N, typename A>
__device__ void multiply_rows(float (&d)[M][N][4], const A& a, const unsigned char* shared, int place) {
#pragma unroll
  for (int k = 0; k < kWidth / 16; ++k) {
    uint32_t left[M][4];
    a(k, left);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t right[4];
      ldmatrix<4>(right, shared + Tile<kWidth>::moved(place, n * 8, k * 2));
      multiply_two<T>(d, n, left, right);
    }
  }
}

// d += a b for the 16 * K rows b of a tile; `place` is the lane's, by Tile::down. Of the columns every kStep / 2-th
// sixteen are taken.
template <typename T, int kWidth, int K, int kStep = 2, int M, int N, typename A>
__device__ void multiply_columns(float (&d)[M][N][4], const A& a, const unsigned char* shared, int place) {
#pragma unroll
  for (int k = 0; k < K; ++k) {
    uint32_t left[M][4];
    a(k, left);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t right[4];
      ldmatrix_trans<4>(right, shared + Tile<kWidth>::moved(place, k * 16, n / 2 * kStep));
      multiply_two<T>(d, n, left, right);
    }
  }
}

// A first factor that is in registers.
template <int M, int K>
__device__ auto from_registers(const uint32_t (&a)[M][K][4]) {
  return [&a](int k, uint32_t (&left)[M][4]) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) left[m][i] = a[m][k][i];
    }
  };
}

// Leaves 16 rows of a result in a tile, rows group and group + 8 times a factor each; `place` is that of this lane's
// first element of the first row. Columns as in multiply_columns.
template <typename T, int kWidth, int kStep = 2, int N>
__device__ void store_rows(unsigned char* shared, int place, const float (&d)[N][4], float low, float high) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float factor = half == 0 ? low : high;
      *reinterpret_cast<uint32_t*>(shared + Tile<kWidth>::moved(place, half * 8, n / 2 * kStep + n % 2)) =
          pack<T>(d[n][half * 2] * factor, d[n][half * 2 + 1] * factor);
    }
  }
}

}  // namespace fastlm
