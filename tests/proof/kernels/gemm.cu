// A matrix product on tensor cores, with what attention is made of: it shows that the proof accepts such a kernel, and,
// with one of the bugs below, that it does not accept any.
//
// c [m, n] = a [m, k] b in fp32, for b [k, n], or b [n, k] if kTransposed. A block of 4 warps has a tile of 64 x 64, a
// warp 32 x 32 of it. Along k, tiles of 64 come into three buffers of shared memory by cp.async, two ahead of the one
// that is multiplied; the rows' pieces of 16 bytes are exchanged by the row's number, so that neither the copies nor
// ldmatrix have bank conflicts. Past the edges the tiles are filled with zeros.
//
// Bytes of global memory: a is read ceil(n / 64) times, b ceil(m / 64) times, c is written once.
#include "common/vec.cuh"
#include "proof_kernel.h"

namespace fastlm {
namespace proof {
namespace {

constexpr int kTile = 64;                // rows and columns of a block's tile, and of the tiles along k
constexpr int kPiece = 8;                // elements in 16 bytes
constexpr int kPieces = kTile / kPiece;  // in a row of a tile
constexpr int kStages = 3;               // buffers
constexpr int kThreads = 128;
constexpr int kWarpTile = 32;  // rows and columns of a warp's part

enum class Bug { kNone, kShortWait, kNoBarrier, kEarlyRefill, kUnswizzled, kNoZeroFill };

// A matrix in global memory.
template <typename T>
struct Matrix {
  const T* at;  // [rows, cols], aligned to 16 bytes
  int rows, cols;
  int64_t stride;  // between rows, a multiple of 8
};

// A tile in shared memory, as pieces of 16 bytes.
template <typename T, Bug kBug>
class Tile {
 public:
  __device__ explicit Tile(Packed<T, kPiece>* pieces) : pieces_(pieces) {}

  __device__ Packed<T, kPiece>* piece(int row, int column) const {
    const int swizzle = kBug == Bug::kUnswizzled ? 0 : row % kPieces;
    return pieces_ + row * kPieces + (column / kPiece ^ swizzle);
  }

  // Copies the tile of `from` that begins at this row and column: neighbouring threads copy neighbouring pieces.
  __device__ void copy(const Matrix<T>& from, int row, int column) const {
    for (int i = threadIdx.x; i < kTile * kPieces; i += kThreads) {
      const int r = i / kPieces, c = i % kPieces * kPiece;
      int elements = row + r < from.rows ? min(max(from.cols - (column + c), 0), kPiece) : 0;
      if (kBug == Bug::kNoZeroFill) elements = kPiece;
      // Of a piece that lies outside nothing is read, but its address should be the matrix's nonetheless.
      const T* const at = elements > 0 ? from.at + (row + r) * from.stride + column + c : from.at;
      cp_async<16>(piece(r, c), at, elements * static_cast<int>(sizeof(T)));  // LINE: copy
    }
  }

 private:
  Packed<T, kPiece>* const pieces_;
};

template <typename T, bool kTransposed, Bug kBug>
__device__ void gemm(const Args& args, Packed<T, kPiece>* shared) {
  const int m = static_cast<int>(args.numbers[0]), n = static_cast<int>(args.numbers[1]);
  const int k = static_cast<int>(args.numbers[2]);
  const Matrix<T> a = {args.tensor<T>(0), m, k, args.numbers[3]};
  const Matrix<T> b = {args.tensor<T>(1), kTransposed ? n : k, kTransposed ? k : n, args.numbers[4]};
  float* const c = args.tensor<float>(2);
  const int64_t c_stride = args.numbers[5];  // even
  const int first_row = blockIdx.y * kTile, first_column = blockIdx.x * kTile;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_row = warp / 2 * kWarpTile, warp_column = warp % 2 * kWarpTile;

  constexpr int kTilePieces = kTile * kPieces;
  const auto a_tile = [&](int tile) { return Tile<T, kBug>(shared + tile % kStages * 2 * kTilePieces); };
  const auto b_tile = [&](int tile) { return Tile<T, kBug>(shared + (tile % kStages * 2 + 1) * kTilePieces); };
  const int tiles = (k + kTile - 1) / kTile;
  const auto fill = [&](int tile) {
    if (tile < tiles) {
      a_tile(tile).copy(a, first_row, tile * kTile);
      b_tile(tile).copy(b, kTransposed ? first_column : tile * kTile, kTransposed ? tile * kTile : first_column);
    }
    cp_async_commit();  // a group for every tile, if an empty one: so the last tiles are waited for as all others
  };

  float d[2][4][4];
  for (auto& row : d) {
    for (auto& fragment : row) {
      for (float& x : fragment) x = 0.0f;
    }
  }
  for (int tile = 0; tile < kStages - 1; ++tile) fill(tile);
  for (int tile = 0; tile < tiles; ++tile) {
    if (kBug == Bug::kEarlyRefill) fill(tile + kStages - 1);
    cp_async_wait<kBug == Bug::kShortWait || kBug == Bug::kEarlyRefill ? kStages - 1 : kStages - 2>();
    // After this barrier all see this tile, and none reads the one before any more, whose buffer is filled next.
    if (kBug != Bug::kNoBarrier) __syncthreads();
    if (kBug != Bug::kEarlyRefill) fill(tile + kStages - 1);
#pragma unroll
    for (int step = 0; step < kTile; step += 16) {
      uint32_t a_fragment[2][4], b_fragment[4][2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const auto* const row = a_tile(tile).piece(warp_row + i * 16 + lane % 16, step + lane / 16 * 8);
        ldmatrix<4>(a_fragment[i], row);  // LINE: read
      }
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        const int column = warp_column + j * 8;
        uint32_t two[4];  // fragments of 8 columns each
        if constexpr (kTransposed) {
          const auto* const row = b_tile(tile).piece(column + lane / 16 * 8 + lane % 8, step + lane / 8 % 2 * 8);
          ldmatrix<4>(two, row);  // LINE: read
        } else {
          const auto* const row = b_tile(tile).piece(step + lane % 16, column + lane / 16 * 8);
          ldmatrix_trans<4>(two, row);  // LINE: read
        }
        for (int i = 0; i < 4; ++i) b_fragment[j + i / 2][i % 2] = two[i];
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) mma_16816<T>(d[i][j], a_fragment[i], b_fragment[j]);
      }
    }
  }

  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 4; ++j) {
      for (int half = 0; half < 2; ++half) {
        const int row = first_row + warp_row + i * 16 + half * 8 + lane / 4;
        const int column = first_column + warp_column + j * 8 + lane % 4 * 2;
        float* const at = c + row * c_stride + column;
        const float x[2] = {d[i][j][half * 2], d[i][j][half * 2 + 1]};
        if (row < m && column + 1 < n) {
          store<2>(at, x);
        } else if (row < m && column < n) {
          at[0] = x[0];
        }
      }
    }
  }
}

}  // namespace

// a, b, c; m, n, k and the strides of their rows. Grid: (tiles of n, tiles of m); shared memory: 48 KiB.
#define GEMM(name, T, transposed, bug)           \
  PROOF_KERNEL(name) {                           \
    using Piece = Packed<T, kPiece>;             \
    FASTLM_DYNAMIC_SHARED(Piece, shared);        \
    gemm<T, transposed, Bug::bug>(args, shared); \
  }
GEMM(gemm_bf16, __nv_bfloat16, false, kNone)
GEMM(gemm_fp16, __half, false, kNone)
GEMM(gemm_bf16_transposed, __nv_bfloat16, true, kNone)
GEMM(gemm_fp16_transposed, __half, true, kNone)
GEMM(gemm_short_wait, __nv_bfloat16, false, kShortWait)
GEMM(gemm_no_barrier, __nv_bfloat16, false, kNoBarrier)
GEMM(gemm_early_refill, __nv_bfloat16, false, kEarlyRefill)
GEMM(gemm_unswizzled, __nv_bfloat16, false, kUnswizzled)
GEMM(gemm_no_zero_fill, __nv_bfloat16, false, kNoZeroFill)

}  // namespace proof
}  // namespace fastlm
