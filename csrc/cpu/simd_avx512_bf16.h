// AVX-512 with the dot product of bf16 pairs.
#pragma once

#include "cpu/simd_avx512.h"

namespace pyqe::cpu {
namespace {

struct Avx512Bf16 : Avx512 {
  static constexpr bool kBf16Pairs = true;

  // acc + a.even b.even + a.odd b.odd in every lane, a lane being a pair of bf16. Subnormal inputs count as
  // zero.
  static F32 dot(F32 acc, F32 a, F32 b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }
};

}  // namespace
}  // namespace pyqe::cpu
