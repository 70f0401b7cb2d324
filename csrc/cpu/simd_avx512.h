// AVX-512 F, BW, DQ and VL: sixteen lanes.
#pragma once

#include <immintrin.h>

#include "core/dtype.h"

namespace pyqe::cpu {
namespace {

struct Avx512 {
  static constexpr int kWidth = 16;
  typedef float F32 __attribute__((vector_size(64)));
  typedef std::int32_t I32 __attribute__((vector_size(64)));

  static F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }

  static float sum(F32 v) { return _mm512_reduce_add_ps(v); }

  static F32 widen(const Float16* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }

  static void narrow(Float16* to, F32 v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
};

}  // namespace
}  // namespace pyqe::cpu
