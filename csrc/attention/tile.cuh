// A tile in shared memory: rows of kWidth 16-bit elements as pieces of 16 bytes, which are exchanged within a row by
// the row's number, so that neither copies of rows nor ldmatrix, which takes one piece of each of eight rows, have bank
// conflicts.
#pragma once

#include "common/device.cuh"
#include "common/vec.cuh"

namespace fastlm {

constexpr int kPiece = 8;  // elements in 16 bytes

template <int kWidth>
struct Tile {
  static constexpr int kPieces = kWidth / kPiece;
  static constexpr int kExchanged = kPieces % 8 == 0 ? 8 : 4;  // pieces that exchange places: of 128 or 64 bytes
  static constexpr int kRowBytes = kWidth * 2;
  static_assert(kPieces % kExchanged == 0, "whole groups of pieces");

  // Where a piece of a row begins, in bytes.
  __device__ static int place(int row, int piece) {
    return row * kRowBytes + (piece ^ (row / (8 / kExchanged) % kExchanged)) * 16;
  }

  // From the place of a piece of a row to that `pieces` on in the row `rows` on (a multiple of 8), without looking at
  // the row again; the numbers of pieces have no bit in common. The tile may begin at any multiple of 128 bytes.
  __device__ static int moved(int place, int rows, int pieces) {
    return (place ^ pieces % kExchanged * 16) + pieces / kExchanged * kExchanged * 16 + rows * kRowBytes;
  }

  // This lane's row and piece for ldmatrix of four matrices, which are numbered down the rows first, or along a row.
  __device__ static int down(int lane) { return place(lane % 16, lane / 16); }
  __device__ static int along(int lane) { return place(lane / 16 * 8 + lane % 8, lane / 8 % 2); }

  // And for the elements of a fragment's first row, of which it has two neighbours in the first piece.
  __device__ static int element(int row, int lane) { return place(row + lane / 4, 0) + lane % 4 * 4; }

  // function(row, piece, place) for this thread's share of kRows rows: neighbouring threads have neighbouring pieces.
  template <int kRows, int kThreads, typename F>
  __device__ static void for_each_piece(const F& function) {
    constexpr int kRowsAtOnce = kThreads / kExchanged;
    static_assert(kRows % kRowsAtOnce == 0 && kRowsAtOnce % 8 == 0, "whole rounds, in which the exchange is the same");
    const int first = threadIdx.x / kExchanged, piece = threadIdx.x % kExchanged, start = place(first, piece);
#pragma unroll
    for (int row = 0; row < kRows; row += kRowsAtOnce) {
#pragma unroll
      for (int more = 0; more < kPieces; more += kExchanged) {
        function(first + row, piece + more, start + row * kRowBytes + more * 16);
      }
    }
  }

  // Begins to copy kRows rows; `at` says where a row lies. Those from `rows` on and columns from `columns` are zeros.
  template <int kRows, int kThreads, typename T, typename At>
  __device__ static void copy(unsigned char* tile, const At& at, int rows, int columns, const T* tensor) {
    for_each_piece<kRows, kThreads>([&](int row, int piece, int place) {
      const bool exists = row < rows && piece * kPiece < columns;
      cp_async<16>(tile + place, exists ? at(row) + piece * kPiece : tensor, exists ? 16 : 0);
    });
  }

  // The other way.
  template <int kRows, int kThreads, typename T, typename At>
  __device__ static void write(const unsigned char* tile, const At& at, int rows, int columns) {
    using Whole = Packed<T, kPiece>;
    for_each_piece<kRows, kThreads>([&](int row, int piece, int place) {
      if (row < rows && piece * kPiece < columns) {
        *reinterpret_cast<Whole*>(at(row) + piece * kPiece) = *reinterpret_cast<const Whole*>(tile + place);
      }
    });
  }
};

// Rows of a tensor that are copied tile after tile: a thread keeps where its share of the next one lies.
template <int kWidth, int kThreads>
class Rows16 {
  using Shape = Tile<kWidth>;
  static constexpr int kRowsAtOnce = kThreads / Shape::kExchanged, kGroups = Shape::kPieces / Shape::kExchanged;

 public:
  // From `first` on, of `rows` rows at `tensor` and `columns` columns.
  template <typename T>
  __device__ Rows16(const T* tensor, int64_t stride, int first, int rows, int columns)
      : step_(stride * kRowsAtOnce * static_cast<int>(sizeof(T))) {
    const int row = first + threadIdx.x / Shape::kExchanged, piece = threadIdx.x % Shape::kExchanged;
    at_ = reinterpret_cast<const unsigned char*>(tensor + row * stride + piece * kPiece);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      left_[g] = (piece + g * Shape::kExchanged) * kPiece < columns ? rows - row : 0;
    }
  }

  // Begins to copy the next kRows rows; those that do not exist are zeros, as are columns.
  template <int kRows>
  __device__ void copy(unsigned char* tile) {
    static_assert(kRows % kRowsAtOnce == 0 && kRowsAtOnce % 8 == 0, "whole rounds, in which the exchange is the same");
    tile += Shape::place(threadIdx.x / Shape::kExchanged, threadIdx.x % Shape::kExchanged);
#pragma unroll
    for (int row = 0; row < kRows; row += kRowsAtOnce) {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const int group = g * Shape::kExchanged * 16;
        cp_async<16>(tile + row * Shape::kRowBytes + group, at_ + group, row < left_[g] ? 16 : 0);
      }
      at_ += step_;
    }
#pragma unroll
    for (int g = 0; g < kGroups; ++g) left_[g] -= kRows;
  }

 private:
  const unsigned char* at_;
  int64_t step_;
  int left_[kGroups];  // rows, of each group of columns
};

}  // namespace fastlm
