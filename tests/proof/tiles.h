// The tiles of AMX in software, for processors without them: included ahead of everything by tests/proof/cpu.py. Tiles
// are all of 16 rows of 64 bytes; one that is used where no configuration is loaded traps.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include <immintrin.h>

#define __AMX_BF16__ 1

namespace tiles {

struct Tile {
  uint32_t words[16][16];
};

struct State {
  bool configured;
  Tile tiles[8];
};

inline Tile& tile(int n) {
  static thread_local State state;
  if (n < 0) return state.configured = n == -1, state.tiles[0];
  if (!state.configured) __builtin_trap();
  return state.tiles[n];
}

inline void load(int n, const void* from, int64_t stride) {
  for (int r = 0; r < 16; ++r) memcpy(tile(n).words[r], static_cast<const char*>(from) + r * stride, 64);
}

inline void store(int n, void* to, int64_t stride) {
  for (int r = 0; r < 16; ++r) memcpy(static_cast<char*>(to) + r * stride, tile(n).words[r], 64);
}

inline float low(uint32_t pair) {
  const uint32_t bits = pair << 16;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
inline float high(uint32_t pair) { return low(pair >> 16); }

inline void multiply_add(int c, int a, int b) {
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 16; ++n) {
      float sum;
      memcpy(&sum, &tile(c).words[m][n], sizeof sum);
      for (int k = 0; k < 16; ++k) {
        const uint32_t x = tile(a).words[m][k], y = tile(b).words[k][n];
        sum = fmaf(high(x), high(y), fmaf(low(x), low(y), sum));
      }
      memcpy(&tile(c).words[m][n], &sum, sizeof sum);
    }
  }
}

}  // namespace tiles

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) (static_cast<void>(config), static_cast<void>(tiles::tile(-1)))
#define _tile_release() static_cast<void>(tiles::tile(-2))
#define _tile_zero(n) static_cast<void>(tiles::tile(n) = tiles::Tile())
#define _tile_loadd(n, from, stride) tiles::load(n, from, stride)
#define _tile_stored(n, to, stride) tiles::store(n, to, stride)
#define _tile_dpbf16ps(c, a, b) tiles::multiply_add(c, a, b)
