// Mean NLL of softmax(beta z) and its derivatives in beta, over one instruction set.
//
// With d_c = z_c - max z, p_c = exp(beta d_c), P = sum p and E the mean with weights p / P, a row of logits z
// and its label y add
//     log P - beta d_y     to the NLL,
//     E[d] - d_y           to the first derivative,
//     E[(d - E[d])^2]      to the second.
// The rounding of fp32 sums averages out over rows that differ, but logits made of stated probabilities are
// much alike. So the p of a strip are kept, E[d] is first taken roughly, as m, and then as m + E[d - m]: the
// errors are now relative to the spread of d rather than to its size. A negative beta is |beta| with the
// logits -z.
#pragma once

#include "cpu/inverse_softmax_kernels.h"
#include "cpu/simd.h"
#include "cpu/temperature.h"

namespace pyqe::cpu {
namespace {

constexpr float kLargest = 0x1.fffffep127f;

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

// 0 times this is 0; times -inf it would be NaN.
template <class Isa>
typename Isa::F32 finite(typename Isa::F32 d) {
  return -kLargest > d ? broadcast<Isa>(-kLargest) : d;
}

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

// The largest of at least kWidth logits; anything if one is NaN.
template <class Isa, class T>
float row_maximum(const T* row, std::int64_t classes, const InverseTemperature<Isa>& beta) {
  using F32 = typename Isa::F32;
  F32 maxima = beta.sign * load_vector<Isa>(row + classes - Isa::kWidth);
  for (std::int64_t c = 0; c + Isa::kWidth <= classes; c += Isa::kWidth) {
    const F32 z = beta.sign * load_vector<Isa>(row + c);
    maxima = z > maxima ? z : maxima;
  }
  float maximum = maxima[0];
  for (int i = 1; i < Isa::kWidth; ++i) maximum = maxima[i] > maximum ? maxima[i] : maximum;
  return maximum;
}

// Weight, mean and sum of squared deviations of a part of a row, and the label's part of d_y.
struct Spread {
  double weight = 0, mean = 0, squares = 0, target = 0;

  void merge(const Spread& part) {
    target += part.target;
    if (part.weight == 0) return;
    const double difference = part.mean - mean, share = part.weight / (weight + part.weight);
    squares += part.squares + difference * difference * weight * share;
    weight += part.weight;
    mean += difference * share;
  }
};

// A row of at least kWidth classes, a vector at a time. What the vectors leave over comes last, in a vector
// that ends where the row does and leaves out the logits that came before: a load of part of a vector goes
// through a buffer and waits for it.
template <class Isa, class T>
struct LongRow {
  using F32 = typename Isa::F32;
  static constexpr int kStrip = 32;  // vectors

  const T* logits;
  const float* labels;  // or null
  std::int64_t classes;
  InverseTemperature<Isa> beta;
  float maximum;

  F32 distance(std::int64_t c) const {
    return Isa::fma(load_vector<Isa>(logits + c), beta.sign, broadcast<Isa>(-maximum));
  }

  // Of `vectors` whole vectors from `first` on, and of the `rest` classes after them.
  Spread strip(std::int64_t first, int vectors, std::int64_t rest) const {
    const std::int64_t last = classes - Isa::kWidth;
    const auto seen = lanes_below<Isa>(Isa::kWidth - rest);
    F32 p[kStrip + 1], sum = {}, product = {};
    for (int i = 0; i < vectors; ++i) {
      const F32 d = distance(first + i * Isa::kWidth);
      p[i] = boltzmann<Isa>(d, beta);
      sum += p[i];
      product += p[i] * finite<Isa>(d);
    }
    if (rest) {
      const F32 d = distance(last);
      p[vectors] = seen ? F32{} : boltzmann<Isa>(d, beta);
      sum += p[vectors];
      product += p[vectors] * finite<Isa>(d);
    }
    const float weight = Isa::sum(sum), centre = Isa::sum(product) / weight;
    Spread spread;
    if (labels) spread.target = target(first, vectors, rest);
    if (weight == 0) return spread;

    F32 deviation = {}, squares = {};
    const auto add = [&](F32 weights, F32 d) {
      const F32 difference = finite<Isa>(d) - centre, weighted = weights * difference;
      deviation += weighted;
      squares = Isa::fma(weighted, difference, squares);
    };
    for (int i = 0; i < vectors; ++i) add(p[i], distance(first + i * Isa::kWidth));
    if (rest) add(p[vectors], distance(last));
    const double correction = static_cast<double>(Isa::sum(deviation)) / weight;
    spread.weight = weight;
    spread.mean = centre + correction;
    spread.squares = Isa::sum(squares) - weight * correction * correction;
    return spread;
  }

  double target(std::int64_t first, int vectors, std::int64_t rest) const {
    F32 sum = {};
    for (std::int64_t c = first; c < first + vectors * Isa::kWidth; c += Isa::kWidth) {
      sum += soft_target<Isa>(load_vector<Isa>(labels + c), distance(c));
    }
    if (rest) {
      const std::int64_t last = classes - Isa::kWidth;
      const F32 label = lanes_below<Isa>(Isa::kWidth - rest) ? F32{} : load_vector<Isa>(labels + last);
      sum += soft_target<Isa>(label, distance(last));
    }
    return Isa::sum(sum);
  }
};

template <class Isa, class T>
TemperatureSums temperature_nll_row(const TemperatureNll& args, const InverseTemperature<Isa>& beta,
                                    std::int64_t n) {
  const T* logits = static_cast<const T*>(args.logits.data) + n * args.logits.stride;
  const float* labels =
      args.labels ? nullptr : static_cast<const float*>(args.soft_labels.data) + n * args.soft_labels.stride;
  const float maximum = row_maximum<Isa>(logits, args.classes, beta);
  const LongRow<Isa, T> row = {logits, labels, args.classes, beta, maximum};
  const std::int64_t vectors = args.classes / Isa::kWidth, rest = args.classes % Isa::kWidth;
  Spread spread;
  for (std::int64_t first = 0; first < vectors; first += row.kStrip) {
    const bool is_last = vectors - first <= row.kStrip;
    spread.merge(row.strip(first * Isa::kWidth, static_cast<int>(is_last ? vectors - first : row.kStrip),
                           is_last ? rest : 0));
  }
  if (args.labels) spread.target = hard_target(logits, args.labels[n], args, beta.sign[0], maximum);
  return {__builtin_log(spread.weight), spread.mean, spread.target, spread.squares / spread.weight};
}

// Rows up to this length share vectors: sums over the lanes are most of the work on a short row.
constexpr std::int64_t kShortRow = 64;

// Rows of any dtype as fp32, without gaps.
template <class Isa, class T>
void widen_rows(const T* from, std::int64_t stride, std::int64_t rows, std::int64_t classes, float* to) {
  if (stride == classes) classes *= rows, rows = 1;
  for (std::int64_t r = 0; r < rows; ++r) widen<Isa>(from + r * stride, classes, to + r * classes);
}

// [kWidth, classes] -> [classes, kWidth]
template <class Isa>
void transpose(const float* rows, std::int64_t classes, float* columns) {
  for (std::int64_t c = 0; c < classes; ++c) {
    for (int r = 0; r < Isa::kWidth; ++r) columns[c * Isa::kWidth + r] = rows[r * classes + c];
  }
}

// Sums in double, a lane each.
template <class Isa>
struct LaneSums {
  typedef double F64 __attribute__((vector_size(8 * Isa::kWidth)));
  F64 log_partition = {}, mean = {}, target = {}, variance = {};

  static void add(F64& sums, typename Isa::F32 terms, typename Isa::I32 counted) {
    sums += __builtin_convertvector(counted ? terms : typename Isa::F32{}, F64);
  }

  TemperatureSums total() const {
    double lanes[4][Isa::kWidth];
    static_assert(sizeof log_partition == sizeof lanes[0], "a double for each lane");
    __builtin_memcpy(lanes[0], &log_partition, sizeof lanes[0]);
    __builtin_memcpy(lanes[1], &mean, sizeof lanes[1]);
    __builtin_memcpy(lanes[2], &target, sizeof lanes[2]);
    __builtin_memcpy(lanes[3], &variance, sizeof lanes[3]);
    TemperatureSums sums = {};
    for (int i = 0; i < Isa::kWidth; ++i)
      accumulate(sums, {lanes[0][i], lanes[1][i], lanes[2][i], lanes[3][i]});
    return sums;
  }
};

// Up to kWidth short rows, each in a lane of its own.
template <class Isa, class T>
void temperature_nll_short_rows(const TemperatureNll& args, const InverseTemperature<Isa>& beta,
                                std::int64_t first, std::int64_t rows, LaneSums<Isa>& sums) {
  using F32 = typename Isa::F32;
  constexpr int kWidth = Isa::kWidth;
  const std::int64_t classes = args.classes;
  float z[kShortRow * kWidth], columns[kShortRow * kWidth];
  for (std::int64_t i = rows * classes; i < kWidth * classes; ++i) z[i] = 0;
  widen_rows<Isa>(static_cast<const T*>(args.logits.data) + first * args.logits.stride, args.logits.stride,
                  rows, classes, z);
  transpose<Isa>(z, classes, columns);

  F32 maximum = beta.sign * load_vector<Isa>(columns);
  for (std::int64_t c = 1; c < classes; ++c) {
    const F32 column = beta.sign * load_vector<Isa>(columns + c * kWidth);
    maximum = column > maximum ? column : maximum;
  }
  F32 d[kShortRow], p[kShortRow], sum = {}, product = {};
  for (std::int64_t c = 0; c < classes; ++c) {
    d[c] = Isa::fma(load_vector<Isa>(columns + c * kWidth), beta.sign, -maximum);
    p[c] = boltzmann<Isa>(d[c], beta);
    sum += p[c];
    product += p[c] * finite<Isa>(d[c]);
  }
  const F32 centre = product / sum;
  F32 deviation = {}, squares = {};
  for (std::int64_t c = 0; c < classes; ++c) {
    const F32 difference = finite<Isa>(d[c]) - centre, weighted = p[c] * difference;
    deviation += weighted;
    squares = Isa::fma(weighted, difference, squares);
  }
  F32 target = {};
  if (args.labels) {
    for (std::int64_t r = 0; r < rows; ++r) {
      target[r] = hard_target(z + r * classes, args.labels[first + r], args, beta.sign[0], maximum[r]);
    }
  } else {
    widen_rows<Isa>(static_cast<const float*>(args.soft_labels.data) + first * args.soft_labels.stride,
                    args.soft_labels.stride, rows, classes, z);
    transpose<Isa>(z, classes, columns);
    for (std::int64_t c = 0; c < classes; ++c) {
      target += soft_target<Isa>(load_vector<Isa>(columns + c * kWidth), d[c]);
    }
  }
  const auto counted = lanes_below<Isa>(rows);
  const F32 correction = deviation / sum;
  sums.add(sums.log_partition, log<Isa>(sum), counted);
  sums.add(sums.mean, centre, counted);
  sums.add(sums.mean, correction, counted);
  sums.add(sums.target, target, counted);
  sums.add(sums.variance, squares / sum - correction * correction, counted);
}

template <class Isa, class T>
TemperatureSums temperature_nll(const TemperatureNll& args, std::int64_t begin, std::int64_t end) {
  const InverseTemperature<Isa> beta(args.beta);
  if (args.classes <= kShortRow) {
    LaneSums<Isa> sums;
    for (std::int64_t n = begin; n < end; n += Isa::kWidth) {
      temperature_nll_short_rows<Isa, T>(args, beta, n, end - n < Isa::kWidth ? end - n : Isa::kWidth, sums);
    }
    return sums.total();
  }
  TemperatureSums sums = {};
  for (std::int64_t n = begin; n < end; ++n) accumulate(sums, temperature_nll_row<Isa, T>(args, beta, n));
  return sums;
}

}  // namespace
}  // namespace pyqe::cpu
