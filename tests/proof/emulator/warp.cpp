// What the lanes of a warp do together: shuffles, votes, ldmatrix, mma. Layouts of fragments as in the PTX ISA.
#include <cmath>

#include "runtime.h"

namespace fastlm {
namespace emulator {
namespace {

template <typename T>
T* operands_of(void* const* lanes, int lane) {
  return static_cast<T*>(lanes[lane]);
}

int first_lane(void* const* lanes) {
  int lane = 0;
  while (lanes[lane] == nullptr) ++lane;
  return lane;
}

// The lane that `lane` reads from (PTX ISA, shfl.sync: of the operand five bits count, and a source outside of its
// segment is the lane itself).
int source_of(const Shuffle& shuffle, int lane) {
  const int first = lane & ~(shuffle.width - 1), last = first + shuffle.width - 1;
  const int operand = shuffle.argument & (kWarpLanes - 1);
  switch (shuffle.mode) {
    case Shuffle::kIndex:
      return first + (operand & (shuffle.width - 1));
    case Shuffle::kUp:
      return lane - operand >= first ? lane - operand : lane;
    case Shuffle::kDown:
      return lane + operand <= last ? lane + operand : lane;
    default:
      return (lane ^ operand) <= last ? lane ^ operand : lane;
  }
}

struct Match {
  uint64_t value;
  uint32_t result;
};

float widened(uint32_t two, int half, MmaType type) {
  const auto bits16 = static_cast<uint16_t>(two >> 16 * half);
  if (type == MmaType::kBFloat16) return bits<float>(static_cast<uint32_t>(bits16) << 16);
  return __half2float(bits<__half>(bits16));
}

// d += a b, each row and column a sum in double, rounded once.
void multiply(void* const* lanes) {
  const Mma* all[kWarpLanes];
  for (int lane = 0; lane < kWarpLanes; ++lane) all[lane] = operands_of<Mma>(lanes, lane);
  const MmaType type = all[0]->type;
  const int depth = type == MmaType::kTf32 ? 8 : 16;
  double a[16][16], b[16][8];
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    const int group = lane / 4, t = lane % 4;
    for (int n = 0; n < 4; ++n) {
      const int row = group + n % 2 * 8;
      if (type == MmaType::kTf32) {
        a[row][t + n / 2 * 4] = bits<float>(all[lane]->a[n] & ~0x1FFFu);
        if (n < 2) b[t + n * 4][group] = bits<float>(all[lane]->b[n] & ~0x1FFFu);
        continue;
      }
      for (int half = 0; half < 2; ++half) {
        a[row][2 * t + half + n / 2 * 8] = widened(all[lane]->a[n], half, type);
        if (n < 2) b[2 * t + half + n * 8][group] = widened(all[lane]->b[n], half, type);
      }
    }
  }
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    for (int n = 0; n < 4; ++n) {
      const int row = lane / 4 + n / 2 * 8, column = lane % 4 * 2 + n % 2;
      double sum = all[lane]->d[n];
      for (int k = 0; k < depth; ++k) sum += a[row][k] * b[k][column];
      all[lane]->d[n] = static_cast<float>(sum);
    }
  }
}

void load_matrices(void* const* lanes) {
  const Ldmatrix& first = *operands_of<Ldmatrix>(lanes, 0);
  const void* rows[kWarpLanes];
  for (int lane = 0; lane < kWarpLanes; ++lane) rows[lane] = operands_of<Ldmatrix>(lanes, lane)->row;
  for (int lane = 0; lane < 8 * first.count; ++lane) {
    const auto address = reinterpret_cast<uintptr_t>(rows[lane]);
    const std::string which = "ldmatrix: the row that lane " + std::to_string(lane) + " gives ";
    if (address % 16 != 0) fail(which + "is not aligned to 16 bytes", first.file, first.line);
    if (shared_at(address, 16) == nullptr) fail(which + "is not in shared memory", first.file, first.line);
  }
  trace_ldmatrix(rows, first.count, first.place);
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    const int group = lane / 4, t = lane % 4;
    for (int m = 0; m < first.count; ++m) {
      const auto element = [&](int row, int column) {
        uint16_t x;
        std::memcpy(&x, static_cast<const unsigned char*>(rows[8 * m + row]) + 2 * column, 2);
        return uint32_t{x};
      };
      operands_of<Ldmatrix>(lanes, lane)->d[m] = first.transpose
                                                     ? element(2 * t, group) | element(2 * t + 1, group) << 16
                                                     : element(group, 2 * t) | element(group, 2 * t + 1) << 16;
    }
  }
}

void whole_warp(const char* what, const char* file, int line) {
  if (block.threads % kWarpLanes != 0 && running_lanes() != 0xFFFFFFFFu) {
    fail(std::string(what) + ": needs all 32 lanes of a warp", file, line);
  }
}

}  // namespace

void shuffle(const char* what, uint32_t mask, Shuffle& operands, const char* file, int line) {
  const Inside inside;
  if (operands.width < 1 || operands.width > kWarpLanes || (operands.width & (operands.width - 1)) != 0) {
    fail(std::string(what) + ": width is a power of two up to 32, got " + std::to_string(operands.width), file, line);
  }
  const int lane = current()->lane, source = source_of(operands, lane);
  if (((mask & running_lanes()) >> source & 1u) == 0) {
    fail(std::string(what) + ": reads lane " + std::to_string(source) + ", which does not take part", file, line);
  }
  collective(
      what, mask, &operands,
      [](void* const* lanes) {
        for (int lane = 0; lane < kWarpLanes; ++lane) {
          if (lanes[lane] == nullptr) continue;
          Shuffle& own = *operands_of<Shuffle>(lanes, lane);
          own.result = operands_of<Shuffle>(lanes, source_of(own, lane))->value;
        }
      },
      file, line);
}

uint32_t match(const char* what, uint32_t mask, uint64_t value, const char* file, int line) {
  const Inside inside;
  Match operands = {value, 0};
  collective(
      what, mask, &operands,
      [](void* const* lanes) {
        for (int lane = first_lane(lanes); lane < kWarpLanes; ++lane) {
          for (int other = 0; lanes[lane] != nullptr && other < kWarpLanes; ++other) {
            if (lanes[other] == nullptr) continue;
            Match& own = *operands_of<Match>(lanes, lane);
            own.result |= static_cast<uint32_t>(own.value == operands_of<Match>(lanes, other)->value) << other;
          }
        }
      },
      file, line);
  return operands.result;
}

void ldmatrix(Ldmatrix operands) {
  const Inside inside;
  whole_warp("ldmatrix", operands.file, operands.line);
  operands.place = reinterpret_cast<uintptr_t>(__builtin_return_address(0)) - 1;
  collective(operands.transpose ? "ldmatrix_trans" : "ldmatrix", 0xFFFFFFFFu, &operands, load_matrices, operands.file,
             operands.line);
}

void mma(const char* what, Mma operands, const char* file, int line) {
  const Inside inside;
  whole_warp(what, file, line);
  collective(what, 0xFFFFFFFFu, &operands, multiply, file, line);
}

}  // namespace emulator
}  // namespace fastlm
