// AMX: products of bf16 in tiles of 16 x 16, beside AVX-512 with BF16 for everything else.
#pragma once

#include "cpu/product.h"
#include "cpu/simd_avx512_bf16.h"

#ifdef PYQE_EMULATED_TILES
#include "emulated_tiles.h"  // tests/cpp runs this file on any processor with AVX-512 BF16
#endif

namespace pyqe::cpu {
namespace {

struct Amx : Avx512Bf16 {
  static constexpr bool kBf16Tiles = true;
};

// The palette that _tile_loadconfig reads: eight tiles of 16 rows of 64 bytes.
struct TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// 32 rows by 32 columns in four tiles, a step of 32 elements at a time. Rows of A are packed as tiles of 16
// rows of 32 elements, [half][step of 32][row][element]; columns of B in pairs, as the dot product of AVX-512
// takes them, which is the form that a tile of B has.
struct TileProduct {
  static constexpr int kRows = 32, kColumns = 32;
  static constexpr std::int64_t kSteps = 16, kTileWords = 256;
  using Pairs = BroadcastProduct<Amx, BFloat16, PairWords<Amx>>;

  struct Session {
    Session() {
      const TileConfig config;
      __asm__ volatile("" : : "r"(&config) : "memory");  // gcc 12 drops the stores into config otherwise
      _tile_loadconfig(&config);
    }
    ~Session() { _tile_release(); }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;
  };

  using Element = BFloat16;

  static std::int64_t depth(std::int64_t dim) { return (dim + 31) / 32 * kSteps; }

  static void pack_rows(const Rows& rows, std::int64_t count, std::int64_t dim, float* panel) {
    const std::int64_t words = depth(dim);
    __builtin_memset(panel, 0, static_cast<std::size_t>(words) * kRows * sizeof(float));
    for (std::int64_t r = 0; r < count; ++r) {
      const BFloat16* row = rows.at<BFloat16>(r);
      float* out = panel + r / 16 * 16 * words + r % 16 * kSteps;
      for (std::int64_t d = 0; d < dim; d += 32, out += kTileWords) {
        __builtin_memcpy(out, row + d,
                         static_cast<std::size_t>(dim - d < 32 ? dim - d : 32) * sizeof(BFloat16));
      }
    }
  }

  static void pack_columns(const Rows& rows, std::int64_t count, std::int64_t dim, float* panel) {
    Pairs::pack_columns(rows, count, dim, panel);
    const std::int64_t filled = Pairs::depth(dim), missing = depth(dim) - filled;
    __builtin_memset(panel + filled * kColumns, 0,
                     static_cast<std::size_t>(missing) * kColumns * sizeof(float));
  }

  static void pack_transposed_rows(const BFloat16* from, std::int64_t stride, std::int64_t dim,
                                   float* panel) {
    const std::int64_t steps = depth(dim);
    for (int half = 0; half < kRows; half += 16, from += 16) {
      for (std::int64_t step = 0; step < steps; step += kSteps, panel += kTileWords) {
        Amx::F32 square[kSteps];
        for (int i = 0; i < kSteps; ++i) {
          const std::int64_t k = 2 * (step + i);
          const BFloat16* row = from + k * stride;
          square[i] =
              k < dim ? PairWords<Amx>::words_across(row, k + 1 < dim ? row + stride : nullptr) : Amx::F32{};
        }
        transpose<Amx>(square);
        __builtin_memcpy(panel, square, sizeof square);
      }
    }
  }

  static void pack_transposed_columns(const Rows& rows, std::int64_t dim, std::int64_t first,
                                      std::int64_t count, std::int64_t steps, float* panels) {
    Pairs::pack_transposed_columns(rows, dim, first, count, steps, panels);
  }

  // Not inlined: among the variables of its caller, the counter of the loop would live in memory.
  template <std::int64_t kStride = 0>
  __attribute__((noinline)) static void multiply(std::int64_t rows, const float* a, const float* b,
                                                 std::int64_t steps, float* c, std::int64_t stride) {
    // gcc does not know that tile loads read memory: from here on, a and b are in it.
    __asm__ volatile("" : : : "memory");
    constexpr std::int64_t kABytes = kStride ? kStride * 4 : 64, kNext = kStride ? kSteps : kTileWords;
    const std::int64_t c_bytes = stride * 4, b_bytes = kColumns * 4;
    const float* lower = a + 16 * (kStride ? kStride : steps);
    _tile_zero(0);
    _tile_zero(1);
    if (rows <= 16) {
      for (std::int64_t s = 0; s < steps; s += kSteps, a += kNext, b += kSteps * kColumns) {
        _tile_loadd(4, a, kABytes);
        _tile_loadd(6, b, b_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + 16, b_bytes);
        _tile_dpbf16ps(1, 4, 7);
      }
    } else {
      _tile_zero(2);
      _tile_zero(3);
      for (std::int64_t s = 0; s < steps; s += kSteps, a += kNext, b += kSteps * kColumns) {
        _tile_loadd(4, a, kABytes);
        _tile_loadd(6, b, b_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + 16, b_bytes);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, lower, kABytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        lower += kNext;
      }
      _tile_stored(2, c + 16 * stride, c_bytes);
      _tile_stored(3, c + 16 * stride + 16, c_bytes);
    }
    _tile_stored(0, c, c_bytes);
    _tile_stored(1, c + 16, c_bytes);
  }
};

template <class Isa>
struct ProductOf<Isa, BFloat16, true, true> {
  using Type = TileProduct;
};

}  // namespace
}  // namespace pyqe::cpu
