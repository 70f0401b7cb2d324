// Mean NLL of softmax(beta z) and its derivatives in beta, over one instruction set.
//
// With d_c = z_c - max z, p_c = exp(beta d_c) and P = sum p, a row of logits z and its label y add
//     log P - beta d_y                    to the NLL,
//     sum(p d) / P - d_y                  to the first derivative, E[d] - d_y,
//     sum(p d^2) / P - (sum(p d) / P)^2   to the second, Var[d].
// So one pass over a row that sits in the cache gives all three. A negative beta is |beta| with the logits
// -z.
#pragma once

#include "cpu/inverse_softmax_kernels.h"
#include "cpu/operations.h"
#include "cpu/simd.h"

namespace pyqe::cpu {
namespace {

constexpr float kInfinity = __builtin_inff(), kLargest = 0x1.fffffep127f;

// kWidth consecutive elements, in order: logits and soft labels differ in dtype and have to meet.
template <class Isa>
typename Isa::F32 load_in_order(const float* from) {
  typename Isa::F32 values;
  __builtin_memcpy(&values, from, sizeof values);
  return values;
}

template <class Isa>
typename Isa::F32 load_in_order(const BFloat16* from) {
  typedef std::uint16_t U16 __attribute__((vector_size(2 * Isa::kWidth)));
  U16 halves;
  __builtin_memcpy(&halves, from, sizeof halves);
  return float_from_bits<Isa>(__builtin_convertvector(halves, typename Isa::I32) << 16);
}

template <class Isa>
typename Isa::F32 load_in_order(const Float16* from) {
  return Isa::widen(from);
}

template <class Isa>
typename Isa::I32 lanes_below(std::int64_t count) {
  typename Isa::I32 lane;
  for (int i = 0; i < Isa::kWidth; ++i) lane[i] = i;
  return lane < static_cast<int>(count);
}

// beta d = (high + low) d / log2(e): one fp32 number in place of beta would shift the whole curve by 2^-25.
template <class Isa>
struct InverseTemperature {
  typename Isa::F32 high, low, sign;

  explicit InverseTemperature(double beta) {
    const double scaled = __builtin_fabs(beta) * 0x1.71547652b82fep0;
    const float rounded = static_cast<float>(scaled);
    high = broadcast<Isa>(rounded);
    low = broadcast<Isa>(static_cast<float>(scaled - rounded));
    sign = broadcast<Isa>(beta < 0 ? -1.0f : 1.0f);
  }
};

// exp(beta d) for d <= 0, within 1 ulp whatever the size of beta d where the processor has a fused
// multiply-add; below 2^-126 it is 0, and so it is for d = -inf.
//
// beta d = (n + r) ln 2 with a whole n and r in [-1/2, 1/2], taken from one fused product: no rounding of
// beta d enters. Adding 1.5 2^23 leaves n in the low bits of the sum. 2^r = 1 + r Q(r), where Q is the
// polynomial of degree 5 with the smallest relative error of 2^r: 2^-28.3, found by iteratively reweighted
// least squares, its coefficients rounded one after the other.
template <class Isa>
__attribute__((always_inline)) inline typename Isa::F32 boltzmann(typename Isa::F32 d,
                                                                  const InverseTemperature<Isa>& beta) {
  using F32 = typename Isa::F32;
  constexpr float kRound = 0x1.8p23f;
  const F32 shifted = Isa::fma(d, beta.high, broadcast<Isa>(kRound));
  const F32 r = Isa::fma(d, beta.low, Isa::fma(d, beta.high, kRound - shifted));

  constexpr float kQ[] = {0x1.62e43p-1f, 0x1.ebfbdcp-3f,  0x1.c6af7cp-5f,
                          0x1.3b2dep-7f, 0x1.5f082ep-10f, 0x1.416b5p-13f};
  F32 q = broadcast<Isa>(kQ[5]);
  for (int i = 4; i >= 0; --i) q = Isa::fma(q, r, broadcast<Isa>(kQ[i]));
  const F32 power = Isa::fma(q, r, broadcast<Isa>(1.0f));
  const F32 scaled = float_from_bits<Isa>(bits_of<Isa>(power) + (bits_of<Isa>(shifted) << 23));
  return shifted < kRound - 126.0f ? F32{} : scaled;
}

// Sums over the classes of a row, or of kWidth rows in as many lanes.
template <class Isa>
struct Moments {
  using F32 = typename Isa::F32;
  F32 p = {}, pd = {}, pdd = {};

  __attribute__((always_inline)) void add(F32 weight, F32 d) {
    const F32 finite = -kLargest > d ? broadcast<Isa>(-kLargest) : d;  // 0 * -inf would be NaN
    const F32 product = weight * finite;
    p += weight;
    pd += product;
    pdd = Isa::fma(product, finite, pdd);
  }
};

// A label of probability 0 contributes nothing, even where d is -inf.
template <class Isa>
typename Isa::F32 soft_target(typename Isa::F32 label, typename Isa::F32 d) {
  return label == 0.0f ? label : label * d;
}

// d_y of a hard label; NaN where there is none, or none that exists.
template <class T>
float hard_target(const T* row, std::int64_t label, const TemperatureNll& args, float sign, float maximum) {
  if (label < 0 || label >= args.classes) return __builtin_nanf("");
  return sign * to_float(row[label]) - maximum;
}

// The largest of at least kWidth logits, NaN passed over.
template <class Isa, class T>
float row_maximum(const T* row, std::int64_t classes, const InverseTemperature<Isa>& beta) {
  using F32 = typename Isa::F32;
  F32 maxima = beta.sign * load_in_order<Isa>(row + classes - Isa::kWidth);
  for (std::int64_t c = 0; c + Isa::kWidth <= classes; c += Isa::kWidth) {
    const F32 z = beta.sign * load_in_order<Isa>(row + c);
    maxima = z > maxima ? z : maxima;
  }
  float maximum = -kInfinity;
  for (int i = 0; i < Isa::kWidth; ++i) maximum = maxima[i] > maximum ? maxima[i] : maximum;
  return maximum;
}

// One row of at least kWidth classes, a vector at a time. What the vectors leave over comes first, in a
// vector that ends where the row does and leaves out the logits that the loop will meet: a partial load
// through a buffer would cost 20 ns a row.
template <class Isa, class T>
TemperatureSums temperature_nll_row(const TemperatureNll& args, const InverseTemperature<Isa>& beta,
                                    std::int64_t n) {
  using F32 = typename Isa::F32;
  constexpr std::int64_t kStrip = 32 * Isa::kWidth;  // so few fp32 terms to a lane that rounding stays small
  const T* row = static_cast<const T*>(args.logits.data) + n * args.logits.stride;
  const float* soft_labels =
      args.labels ? nullptr : static_cast<const float*>(args.soft_labels.data) + n * args.soft_labels.stride;
  const float maximum = row_maximum<Isa>(row, args.classes, beta);
  const auto distance = [&](std::int64_t c) {
    return Isa::fma(load_in_order<Isa>(row + c), beta.sign, broadcast<Isa>(-maximum));
  };
  const std::int64_t rest = args.classes % Isa::kWidth, whole = args.classes - rest;
  Moments<Isa> moments;
  F32 soft = {};
  if (rest) {
    const std::int64_t last = args.classes - Isa::kWidth;
    const auto in_loop = lanes_below<Isa>(Isa::kWidth - rest);
    const F32 d = distance(last);
    moments.add(in_loop ? F32{} : boltzmann<Isa>(d, beta), d);
    if (soft_labels) soft = soft_target<Isa>(in_loop ? F32{} : load_in_order<Isa>(soft_labels + last), d);
  }
  double p = 0, pd = 0, pdd = 0, target = 0;
  for (std::int64_t start = 0; start < whole; start += kStrip) {
    const std::int64_t end = whole - start < kStrip ? whole : start + kStrip;
    for (std::int64_t c = start; c < end; c += Isa::kWidth) {
      const F32 d = distance(c);
      moments.add(boltzmann<Isa>(d, beta), d);
    }
    p += Isa::sum(moments.p), pd += Isa::sum(moments.pd), pdd += Isa::sum(moments.pdd);
    moments = {};
    if (!soft_labels) continue;
    for (std::int64_t c = start; c < end; c += Isa::kWidth) {
      soft += soft_target<Isa>(load_in_order<Isa>(soft_labels + c), distance(c));
    }
    target += Isa::sum(soft);
    soft = F32{};
  }
  if (!soft_labels) target = hard_target(row, args.labels[n], args, beta.sign[0], maximum);
  const double mean = pd / p;
  return {__builtin_log(p), mean, target, pdd / p - mean * mean};
}

// Rows up to this length share vectors: up to 4 times faster than row by row.
constexpr std::int64_t kShortRow = 64;

// Rows of any dtype as fp32, without gaps.
template <class Isa, class T>
void widen_rows(const T* from, std::int64_t stride, std::int64_t rows, std::int64_t classes, float* to) {
  if (stride == classes) classes *= rows, rows = 1;
  const std::int64_t rest = classes % Isa::kWidth, whole = classes - rest;
  for (std::int64_t r = 0; r < rows; ++r, from += stride, to += classes) {
    for (std::int64_t c = 0; c < whole; c += Isa::kWidth) {
      const typename Isa::F32 values = load_in_order<Isa>(from + c);
      __builtin_memcpy(to + c, &values, sizeof values);
    }
    for (std::int64_t c = whole; c < classes; ++c) to[c] = to_float(from[c]);
  }
}

// [kWidth, classes] -> [classes, kWidth]
template <class Isa>
void transpose(const float* rows, std::int64_t classes, float* columns) {
  for (std::int64_t c = 0; c < classes; ++c) {
    for (int r = 0; r < Isa::kWidth; ++r) columns[c * Isa::kWidth + r] = rows[r * classes + c];
  }
}

// Up to kWidth short rows, each in a lane of its own.
template <class Isa, class T>
TemperatureSums temperature_nll_short_rows(const TemperatureNll& args, const InverseTemperature<Isa>& beta,
                                           std::int64_t first, std::int64_t rows) {
  using F32 = typename Isa::F32;
  constexpr int kWidth = Isa::kWidth;
  const std::int64_t classes = args.classes;
  float z[kShortRow * kWidth], columns[kShortRow * kWidth];
  for (std::int64_t i = rows * classes; i < kWidth * classes; ++i) z[i] = 0;
  widen_rows<Isa>(static_cast<const T*>(args.logits.data) + first * args.logits.stride, args.logits.stride,
                  rows, classes, z);
  transpose<Isa>(z, classes, columns);

  F32 maximum = broadcast<Isa>(-kInfinity);
  for (std::int64_t c = 0; c < classes; ++c) {
    const F32 column = beta.sign * load_in_order<Isa>(columns + c * kWidth);
    maximum = column > maximum ? column : maximum;
  }
  Moments<Isa> moments;
  for (std::int64_t c = 0; c < classes; ++c) {
    const F32 d = Isa::fma(load_in_order<Isa>(columns + c * kWidth), beta.sign, -maximum);
    moments.add(boltzmann<Isa>(d, beta), d);
  }
  F32 target = {};
  if (args.labels) {
    for (std::int64_t r = 0; r < rows; ++r) {
      target[r] = hard_target(z + r * classes, args.labels[first + r], args, beta.sign[0], maximum[r]);
    }
  } else {
    float labels[kShortRow * kWidth] = {};
    widen_rows<Isa>(static_cast<const float*>(args.soft_labels.data) + first * args.soft_labels.stride,
                    args.soft_labels.stride, rows, classes, z);
    transpose<Isa>(z, classes, labels);
    for (std::int64_t c = 0; c < classes; ++c) {
      const F32 d = Isa::fma(load_in_order<Isa>(columns + c * kWidth), beta.sign, -maximum);
      target += soft_target<Isa>(load_in_order<Isa>(labels + c * kWidth), d);
    }
  }
  const F32 mean = moments.pd / moments.p;
  const F32 variance = moments.pdd / moments.p - mean * mean;
  const auto total = [counted = lanes_below<Isa>(rows)](F32 terms) {
    return static_cast<double>(Isa::sum(counted ? terms : F32{}));
  };
  return {total(log<Isa>(moments.p)), total(mean), total(target), total(variance)};
}

template <class Isa, class T>
TemperatureSums temperature_nll(const TemperatureNll& args, std::int64_t begin, std::int64_t end) {
  const InverseTemperature<Isa> beta(args.beta);
  const std::int64_t step = args.classes <= kShortRow ? Isa::kWidth : 1;
  TemperatureSums sums = {};
  for (std::int64_t n = begin; n < end; n += step) {
    const std::int64_t rows = end - n < step ? end - n : step;
    accumulate(sums, args.classes <= kShortRow ? temperature_nll_short_rows<Isa, T>(args, beta, n, rows)
                                               : temperature_nll_row<Isa, T>(args, beta, n));
  }
  return sums;
}

}  // namespace
}  // namespace pyqe::cpu
