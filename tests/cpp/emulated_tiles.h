// The AMX instructions that simd_amx.h uses, in plain C++, for a processor without them. What the processor
// would refuse ends the program. Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume
// 2, and volume 1, chapter 18 ("Programming with Intel AMX").
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace pyqe::test {

inline void require_tiles(bool allowed, const char* rule) {
  if (allowed) return;
  std::fprintf(stderr, "emulated tiles: %s\n", rule);
  std::abort();
}

// The tile registers of a thread.
struct Tiles {
  static constexpr int kTiles = 8, kMaxRows = 16, kMaxBytes = 64;

  bool configured = false;
  int rows[kTiles] = {}, row_bytes[kTiles] = {};
  float data[kTiles][kMaxRows][kMaxBytes / 4] = {};

  ~Tiles() { require_tiles(!configured, "a thread ended without releasing its tiles"); }

  void configure(const void* from) {
    unsigned char bytes[64];
    std::memcpy(bytes, from, sizeof bytes);
    require_tiles(bytes[0] == 1, "the palette is 1");
    require_tiles(bytes[1] == 0, "no row to start from");
    for (int i = 2; i < 16; ++i) require_tiles(bytes[i] == 0, "bytes 2 to 15 are reserved");
    for (int i = 32; i < 48; ++i) require_tiles(bytes[i] == 0, "bytes 32 to 47 are reserved");
    for (int i = 56; i < 64; ++i) require_tiles(bytes[i] == 0, "bytes 56 to 63 are reserved");
    for (int tile = 0; tile < kTiles; ++tile) {
      row_bytes[tile] = bytes[16 + 2 * tile] | bytes[17 + 2 * tile] << 8;
      rows[tile] = bytes[48 + tile];
      require_tiles(rows[tile] <= kMaxRows && row_bytes[tile] <= kMaxBytes, "16 rows of 64 bytes at most");
    }
    std::memset(data, 0, sizeof data);
    configured = true;
  }

  void check(int tile) const {
    require_tiles(configured, "tiles are configured before they are used");
    require_tiles(tile >= 0 && tile < kTiles, "there are 8 tiles");
    require_tiles(rows[tile] > 0 && row_bytes[tile] > 0, "the tile has rows");
  }

  void zero(int tile) {
    check(tile);
    std::memset(data[tile], 0, sizeof data[tile]);
  }

  void load(int tile, const void* from, std::int64_t stride) {
    zero(tile);
    for (int r = 0; r < rows[tile]; ++r) {
      std::memcpy(data[tile][r], static_cast<const char*>(from) + r * stride,
                  static_cast<std::size_t>(row_bytes[tile]));
    }
  }

  void store(int tile, void* to, std::int64_t stride) const {
    check(tile);
    for (int r = 0; r < rows[tile]; ++r) {
      std::memcpy(static_cast<char*>(to) + r * stride, data[tile][r],
                  static_cast<std::size_t>(row_bytes[tile]));
    }
  }

  // c[m, n] += sum over k of a[m, 2k] b[k, 2n] and, apart from that, of a[m, 2k + 1] b[k, 2n + 1].
  void dot_bf16(int c, int a, int b) {
    check(c), check(a), check(b);
    require_tiles(c != a && c != b && a != b, "three different tiles");
    require_tiles(rows[a] == rows[c] && row_bytes[a] == 4 * rows[b] && row_bytes[b] == row_bytes[c],
                  "the shapes fit");
    for (int m = 0; m < rows[c]; ++m) {
      for (int n = 0; n < row_bytes[c] / 4; ++n) {
        float even = 0, odd = 0;
        for (int k = 0; k < row_bytes[a] / 4; ++k) {
          even = fma(half(data[a][m][k], 0), half(data[b][k][n], 0), even);
          odd = fma(half(data[a][m][k], 1), half(data[b][k][n], 1), odd);
        }
        data[c][m][n] = flushed(flushed(data[c][m][n]) + flushed(even + odd));
      }
    }
  }

 private:
  static float flushed(float x) { return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0, x) : x; }

  static float fma(float a, float b, float c) { return flushed(__builtin_fmaf(a, b, c)); }

  // One bf16 of a pair, the first in the lower half.
  static float half(float pair, int which) {
    std::uint32_t bits;
    std::memcpy(&bits, &pair, sizeof bits);
    bits = which ? bits & 0xffff0000u : bits << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return flushed(value);
  }
};

inline thread_local Tiles tiles;

}  // namespace pyqe::test

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(from) ::pyqe::test::tiles.configure(from)
#define _tile_release() (::pyqe::test::tiles.configured = false)
#define _tile_zero(tile) ::pyqe::test::tiles.zero(tile)
#define _tile_loadd(tile, from, stride) ::pyqe::test::tiles.load(tile, from, stride)
#define _tile_stored(tile, to, stride) ::pyqe::test::tiles.store(tile, to, stride)
#define _tile_dpbf16ps(c, a, b) ::pyqe::test::tiles.dot_bf16(c, a, b)
