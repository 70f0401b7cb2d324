// Elementary functions of vectors of fp32. Inlined by force: with a call for each vector, the constants are
// loaded anew each time.
#pragma once

#include "cpu/simd.h"

namespace pyqe::cpu {
namespace {

// e^x for x <= 88.3, within 1 ulp; below -87.3 a subnormal number or 0, 0 for -infinity; NaN for NaN.
//
// x = n ln 2 + r with |r| <= ln 2 / 2, and e^r = 1 + r + r^2 P(r) with the polynomial of the Cephes library's
// expf. Adding 1.5 * 2^23 and taking it away rounds to an integer. ln 2 is split in a part of 9 bits, whose
// product with n is exact, and the rest.
template <class Isa>
__attribute__((always_inline)) inline typename Isa::F32 exp(typename Isa::F32 x) {
  using F32 = typename Isa::F32;
  constexpr float kMagic = 0x1.8p23f;
  constexpr float kP[] = {5.0000001201e-1f, 1.6666665459e-1f, 4.1665795894e-2f,
                          8.3334519073e-3f, 1.3981999507e-3f, 1.9875691500e-4f};
  const F32 bounded =
      Isa::max(broadcast<Isa>(Isa::kLowestExponent), x);  // the second argument, where it is NaN
  const F32 n = Isa::fma(bounded, broadcast<Isa>(0x1.715476p0f), broadcast<Isa>(kMagic)) - kMagic;
  F32 r = Isa::fma(n, broadcast<Isa>(-0x1.63p-1f), bounded);
  r = Isa::fma(n, broadcast<Isa>(0x1.bd0106p-13f), r);
  F32 p = broadcast<Isa>(kP[5]);
  for (int i = 4; i >= 0; --i) p = Isa::fma(p, r, broadcast<Isa>(kP[i]));
  return Isa::scale(Isa::fma(r * r, p, r) + 1.0f, n);
}

// 1 / (1 + e^-x), within 3 ulp where x >= -87; less than 1e-38 below, -infinity included; 1 for infinity.
template <class Isa>
__attribute__((always_inline)) inline typename Isa::F32 sigmoid(typename Isa::F32 x) {
  // min returns its second argument where one is NaN.
  return 1.0f / (1.0f + exp<Isa>(Isa::min(broadcast<Isa>(88.0f), -x)));
}

// log(1 + x) for 0 <= x <= 1, within 2 ulp: a small x gives itself, which log of the rounded sum 1 + x would
// lose. x P(x) with the polynomial P of degree 9 and P(0) = 1 of the smallest relative error, 2^-27.7, found
// by iteratively reweighted least squares.
template <class Isa>
__attribute__((always_inline)) inline typename Isa::F32 log1p(typename Isa::F32 x) {
  using F32 = typename Isa::F32;
  constexpr float kP[] = {1.0f,           -0x1.ffffbep-2f, 0x1.554c8p-2f,  -0x1.ff0f88p-3f, 0x1.92f696p-3f,
                          -0x1.39756p-3f, 0x1.b2535cp-4f,  -0x1.d29ccp-5f, 0x1.453f04p-6f,  -0x1.a93356p-9f};
  F32 p = broadcast<Isa>(kP[9]);
  for (int i = 8; i >= 0; --i) p = Isa::fma(p, x, broadcast<Isa>(kP[i]));
  return x * p;
}

// log(1 + e^x) and its derivative 1 / (1 + e^-x) from one exponential, that of -|x|, within 3 ulp; the terms
// below -87.33 count as 0.
template <class Isa>
struct Softplus {
  typename Isa::F32 value, slope;
};

template <class Isa>
__attribute__((always_inline)) inline Softplus<Isa> softplus(typename Isa::F32 x) {
  using F32 = typename Isa::F32;
  const F32 zero = {}, one = broadcast<Isa>(1.0f);
  const F32 power = exp<Isa>(float_from_bits<Isa>(bits_of<Isa>(x) | 0x80000000u));
  // max returns its second argument where one is NaN.
  return {Isa::max(zero, x) + log1p<Isa>(power), (x < zero ? power : one) / (one + power)};
}

// tanh x with an absolute error of 2e-7, which is what a softcap needs: 1 - 2 / (1 + e^2x).
template <class Isa>
__attribute__((always_inline)) inline typename Isa::F32 tanh(typename Isa::F32 x) {
  return 1.0f - 2.0f / (1.0f + exp<Isa>(Isa::min(broadcast<Isa>(88.0f), x + x)));
}

}  // namespace
}  // namespace pyqe::cpu
