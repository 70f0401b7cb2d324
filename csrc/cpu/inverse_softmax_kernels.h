// Inverse softmax in fp32, over one instruction set.
#pragma once

#include "cpu/operations.h"
#include "cpu/row_centre.h"
#include "cpu/simd.h"

namespace pyqe::cpu {
namespace {

// The natural logarithm of x >= 0, within 2 ulp, subnormals included.
//
// x = 2^e m with m in [2/3, 4/3), so that f = m - 1 is exact and e = 0 around x = 1, where the result is
// small. Then log x = e ln 2 + log(1 + f), with log(1 + f) = f - f^2 / 2 + f^3 P(f). P is the polynomial of
// degree 7 with the smallest relative error of log(1 + f) on [-1/3, 1/3]: 2^-27.7, found by iteratively
// reweighted least squares. ln 2 is split in a part of 12 bits, whose product with e is exact, and the rest.
// Inlined by force: with a call for each vector, the constants are loaded anew each time.
template <class Isa>
__attribute__((always_inline)) inline typename Isa::F32 log(typename Isa::F32 x) {
  using F32 = typename Isa::F32;
  using I32 = typename Isa::I32;
  const F32 zero = {}, infinity = broadcast<Isa>(__builtin_inff());
  const I32 subnormal = x < 0x1p-126f;
  const auto bits = bits_of<Isa>(subnormal ? x * 0x1p23f : x);
  const I32 exponent = (I32)(bits - 0x3f2aaaab) >> 23;  // 0x3f2aaaab is 2/3
  const F32 f = float_from_bits<Isa>(bits - ((typename Bits<Isa>::U32)exponent << 23)) - 1.0f;
  const F32 e = __builtin_convertvector(exponent - (subnormal & 23), F32);

  constexpr float kP[] = {0x1.555506p-2f, -0x1.fffefp-3f,  0x1.99d028p-3f, -0x1.559dcap-3f,
                          0x1.1ed716p-3f, -0x1.f31144p-4f, 0x1.1e66cp-3f,  -0x1.08057ep-3f};
  F32 p = broadcast<Isa>(kP[7]);
  for (int i = 6; i >= 0; --i) p = Isa::fma(p, f, broadcast<Isa>(kP[i]));
  const F32 square = f * f;
  const F32 small = Isa::fma(f * square, p, square * -0.5f);
  const F32 correction = Isa::fma(e, broadcast<Isa>(-0x1.bd0106p-13f), small);
  const F32 result = Isa::fma(e, broadcast<Isa>(0x1.63p-1f), f + correction);
  return x == zero ? -infinity : (x == infinity ? infinity : result);
}

template <class Isa>
typename Isa::F32 clamp(typename Isa::F32 probs, float eps) {
  return probs < eps ? broadcast<Isa>(eps) : probs;
}

// One row of any length, a vector at a time.
template <class Isa>
void inverse_softmax_row(const float* probs, float* logits, const InverseSoftmax& args) {
  using F32 = typename Isa::F32;
  using I32 = typename Isa::I32;
  constexpr std::int64_t kPair = kPairWidth<Isa>;
  const std::int64_t rest = args.classes % kPair, whole = args.classes - rest;
  CompensatedSum<F32> sum;
  I32 invalid = {};
  const auto step = [&](F32 p, I32 counted) {
    invalid |= ~(p >= 0.0f);  // negative or NaN
    const F32 clamped = clamp<Isa>(p, static_cast<float>(args.eps));
    const F32 z = log<Isa>(clamped);
    sum.add(counted ? (args.center == Center::kMean ? z : clamped) : F32{});
    return z;
  };
  const I32 all = ~I32{};
  for (std::int64_t c = 0; c < whole; c += kPair) {
    const Pair<Isa> p = load<Isa>(probs + c);
    store<Isa>(logits + c, Pair<Isa>{step(p.first, all), step(p.second, all)});
  }
  if (rest) {
    I32 lane;
    for (int i = 0; i < Isa::kWidth; ++i) lane[i] = i;
    const int count = static_cast<int>(rest);
    const Pair<Isa> p = load_partial<Isa>(probs + whole, rest);
    const Pair<Isa> z = {step(p.first, lane < count), step(p.second, lane + Isa::kWidth < count)};
    store_partial<Isa>(logits + whole, z, rest);
  }
  const double total = static_cast<double>(Isa::sum(sum.sum)) - Isa::sum(sum.excess);
  const bool spoilt = Isa::sum(__builtin_convertvector(invalid, F32)) != 0.0f;
  const float centre = static_cast<float>(row_centre(args, total, spoilt));
  if (centre == 0.0f) return;
  for (std::int64_t c = 0; c < args.classes; ++c) logits[c] -= centre;
}

// Rows that do not fill two vectors, as multiple choice has them: the logarithms of many rows are taken
// together, which is 5 times faster than row by row at 4 classes.
template <class Isa>
void inverse_softmax_short_rows(const InverseSoftmax& args, std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t kElements = 1024;
  const std::int64_t rows_at_once = kElements / args.classes;
  const float eps = static_cast<float>(args.eps);
  float p[kElements], z[kElements];
  for (std::int64_t row = begin; row < end; row += rows_at_once) {
    const std::int64_t rows = end - row < rows_at_once ? end - row : rows_at_once;
    std::int64_t filled = 0;
    for (std::int64_t r = 0; r < rows; ++r) {
      const float* probs = static_cast<const float*>(args.probs.data) + (row + r) * args.probs.stride;
      for (std::int64_t c = 0; c < args.classes; ++c) p[filled++] = probs[c];
    }
    for (std::int64_t i = filled; i % kPairWidth<Isa> != 0; ++i) p[i] = 1;
    for (std::int64_t i = 0; i < filled; i += kPairWidth<Isa>) {
      const Pair<Isa> q = load<Isa>(p + i);
      store<Isa>(z + i, Pair<Isa>{log<Isa>(clamp<Isa>(q.first, eps)), log<Isa>(clamp<Isa>(q.second, eps))});
    }
    float* logits = static_cast<float*>(args.logits) + row * args.classes;
    for (std::int64_t first = 0; first < filled; first += args.classes) {
      double sum = 0;
      bool invalid = false;
      for (std::int64_t i = first; i < first + args.classes; ++i) {
        invalid |= !(p[i] >= 0);
        sum += args.center == Center::kMean ? z[i] : (p[i] < eps ? eps : p[i]);
      }
      const float centre = static_cast<float>(row_centre(args, sum, invalid));
      for (std::int64_t i = first; i < first + args.classes; ++i) logits[i] = z[i] - centre;
    }
  }
}

template <class Isa>
void inverse_softmax(const InverseSoftmax& args, std::int64_t begin, std::int64_t end) {
  if (args.classes == 0) return;
  if (args.classes < kPairWidth<Isa>) return inverse_softmax_short_rows<Isa>(args, begin, end);
  for (std::int64_t n = begin; n < end; ++n) {
    inverse_softmax_row<Isa>(static_cast<const float*>(args.probs.data) + n * args.probs.stride,
                             static_cast<float*>(args.logits) + n * args.classes, args);
  }
}

}  // namespace
}  // namespace pyqe::cpu
