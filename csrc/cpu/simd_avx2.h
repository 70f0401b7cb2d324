// AVX2 with FMA and F16C: eight lanes.
#pragma once

#include <immintrin.h>

#include "core/dtype.h"

namespace pyqe::cpu {
namespace {

struct Avx2 {
  static constexpr int kWidth = 8;
  static constexpr bool kBf16Pairs = false, kBf16Tiles = false;
  static constexpr int kRows = 6;  // with two vectors each: 12 accumulators of 16 registers
  typedef float F32 __attribute__((vector_size(32)));
  typedef std::int32_t I32 __attribute__((vector_size(32)));

  static F32 fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }

  static float sum(F32 v) {
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
  }

  static F32 max(F32 a, F32 b) { return _mm256_max_ps(a, b); }

  static F32 min(F32 a, F32 b) { return _mm256_min_ps(a, b); }

  static float largest(F32 v) {
    const __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 quarter = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(quarter, _mm_movehdup_ps(quarter)));
  }

  static unsigned bits(I32 mask) { return static_cast<unsigned>(_mm256_movemask_ps((__m256)mask)); }

  static void interleave(F32& a, F32& b) {
    const __m256 even = _mm256_unpacklo_ps(a, b), odd = _mm256_unpackhi_ps(a, b);
    a = _mm256_permute2f128_ps(even, odd, 0x20);
    b = _mm256_permute2f128_ps(even, odd, 0x31);
  }

  static F32 widen(const BFloat16* from) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  }

  static F32 widen(const Float16* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }

  static void narrow(Float16* to, F32 v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
};

}  // namespace
}  // namespace pyqe::cpu
