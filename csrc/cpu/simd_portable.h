// Four lanes of the compiler's vector extension: SSE2 on any x86-64, NEON on aarch64, scalar code elsewhere.
#pragma once

#include "core/dtype.h"

namespace pyqe::cpu {
namespace {

struct Portable {
  static constexpr int kWidth = 4;
  static constexpr bool kBf16Pairs = false, kBf16Tiles = false;
  static constexpr int kRows = 4;
  typedef float F32 __attribute__((vector_size(16)));
  typedef std::int32_t I32 __attribute__((vector_size(16)));

  // Two roundings where the processor has no fused form: a call to the C library's would cost 50 times more.
  static F32 fma(F32 a, F32 b, F32 c) { return a * b + c; }

  static float sum(F32 v) { return (v[0] + v[2]) + (v[1] + v[3]); }

  static F32 max(F32 a, F32 b) { return a > b ? a : b; }

  static F32 min(F32 a, F32 b) { return a < b ? a : b; }

  static float largest(F32 v) {
    const float left = v[0] > v[1] ? v[0] : v[1], right = v[2] > v[3] ? v[2] : v[3];
    return left > right ? left : right;
  }

  static unsigned bits(I32 mask) {
    return static_cast<unsigned>((mask[0] & 1) | (mask[1] & 2) | (mask[2] & 4) | (mask[3] & 8));
  }

  static void interleave(F32& a, F32& b) {
    const F32 first = {a[0], b[0], a[1], b[1]};
    b = F32{a[2], b[2], a[3], b[3]};
    a = first;
  }

  static F32 widen(const BFloat16* from) {
    return F32{to_float(from[0]), to_float(from[1]), to_float(from[2]), to_float(from[3])};
  }

  static F32 widen(const Float16* from) {
    return F32{to_float(from[0]), to_float(from[1]), to_float(from[2]), to_float(from[3])};
  }

  static void narrow(Float16* to, F32 v) {
    for (int lane = 0; lane < kWidth; ++lane) to[lane] = to_float16(v[lane]);
  }
};

}  // namespace
}  // namespace pyqe::cpu
