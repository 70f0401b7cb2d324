// AVX-512 F, BW, DQ and VL: sixteen lanes.
#pragma once

#include <immintrin.h>

#include "core/dtype.h"

namespace pyqe::cpu {
namespace {

struct Avx512 {
  static constexpr int kWidth = 16;
  static constexpr bool kBf16Pairs = false, kBf16Tiles = false;
  static constexpr int kRows = 14;  // with two vectors each: 28 accumulators of 32 registers
  typedef float F32 __attribute__((vector_size(64)));
  typedef std::int32_t I32 __attribute__((vector_size(64)));

  static F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }

  static float sum(F32 v) { return _mm512_reduce_add_ps(v); }

  static F32 max(F32 a, F32 b) { return _mm512_max_ps(a, b); }

  static F32 min(F32 a, F32 b) { return _mm512_min_ps(a, b); }

  static float largest(F32 v) { return _mm512_reduce_max_ps(v); }

  static unsigned bits(I32 mask) { return _mm512_movepi32_mask((__m512i)mask); }

  static void interleave(F32& a, F32& b) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    const F32 first = _mm512_permutex2var_ps(a, low, b);
    b = _mm512_permutex2var_ps(a, high, b);
    a = first;
  }

  static F32 widen(const BFloat16* from) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }

  static F32 widen(const Float16* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }

  static void narrow(Float16* to, F32 v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
};

}  // namespace
}  // namespace pyqe::cpu
