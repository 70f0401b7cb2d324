// With d_c = z_c - max z, p_c = exp(beta d_c), P = sum p and E the mean with weights p / P, a row of logits z
// and its label y add
//     log P - beta d_y     to the NLL,
//     E[d] - d_y           to the first derivative,
//     E[(d - E[d])^2]      to the second.
// The lanes of a group read a row, or kTemperaturePart columns of it, once, 16 logits at a time. The rounding
// of fp32 sums averages out over rows that differ, but logits made of stated probabilities are much alike. So
// the mean of the 16 is first taken roughly, and their sums about that: errors are then relative to the
// spread of d rather than to its size. The sums of the lanes, and of the parts of a row, are moved to a
// common maximum and added in double. A negative beta is |beta| with the logits -z.
#include "cuda/rows.h"
#include "cuda/temperature.h"

namespace pyqe::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kHeld = 16;  // logits that a lane holds at a time

// Powers of e^beta as powers of 2, the exponent in two numbers: one would shift the whole curve by 2^-25.
struct Beta {
  double size;
  float sign, high, low;

  __device__ explicit Beta(double beta) : size(fabs(beta)), sign(beta < 0 ? -1.0f : 1.0f) {
    const double scaled = size * 0x1.71547652b82fep0;
    high = static_cast<float>(scaled);
    low = static_cast<float>(scaled - high);
  }

  // exp(|beta| d) for d <= 0; 0 for -infinity even where beta is 0.
  __device__ float power(float d) const {
    const float power = exp2_of(fmaf(d, low, d * high));
    return d == -INFINITY ? 0.0f : power;
  }
};

using Sums = TemperatureSums;

// What can be subtracted from a logit although all logits are -infinity.
__device__ float reference_of(float max) { return max == -INFINITY ? 0.0f : max; }

__device__ float finite(float d) { return d == -INFINITY ? 0.0f : d; }

// The same sums relative to `max`, which is not below theirs.
__device__ Sums moved(const Sums& from, float max, const Beta& beta) {
  const double shift = static_cast<double>(reference_of(from.max)) - reference_of(max);
  const double shrink = beta.power(from.max - reference_of(max));
  Sums to;
  to.max = max;
  to.weight = shrink * from.weight;
  to.first = shrink * (from.first + shift * from.weight);
  to.second = shrink * (from.second + shift * (2 * from.first + shift * from.weight));
  to.labels = from.labels;
  to.target = from.target + shift * from.labels;
  return to;
}

__device__ void add_logits(Sums& sums, const float (&z)[kHeld], const Beta& beta) {
  float max = sums.max;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) max = fmaxf(max, z[i]);
  sums = moved(sums, max, beta);
  max = reference_of(max);
  float p[kHeld], weight = 0, product = 0;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    p[i] = beta.power(z[i] - max);
    weight += p[i];
    product = fmaf(p[i], finite(z[i] - max), product);
  }
  const float centre = weight > 0 ? product / weight : 0.0f;
  float deviation = 0, squares = 0;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const float t = finite(z[i] - max) - centre, weighted = p[i] * t;
    deviation += weighted;
    squares = fmaf(weighted, t, squares);
  }
  const double step = centre;
  sums.weight += weight;
  sums.first += deviation + step * weight;
  sums.second += squares + step * (2.0 * deviation + step * weight);
}

// A label of probability 0 adds nothing, even where the logit is -infinity.
__device__ void add_labels(Sums& sums, const float (&z)[kHeld], const float (&labels)[kHeld]) {
  float sum = 0, target = 0;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    sum += labels[i];
    if (labels[i] != 0) target = fmaf(labels[i], z[i] - reference_of(sums.max), target);
  }
  sums.labels += sum, sums.target += target;
}

// Over the lanes of a group, a power of two; the same in all of them.
template <bool kSoft>
__device__ Sums group_sums(const Sums& lane, int lanes, const Beta& beta) {
  float max = lane.max;
  for (int bits = lanes / 2; bits > 0; bits /= 2) max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, bits));
  Sums sums = moved(lane, max, beta);
  const auto add = [&](double& term, int bits) { term += __shfl_xor_sync(kAllLanes, term, bits); };
  for (int bits = lanes / 2; bits > 0; bits /= 2) {
    add(sums.weight, bits), add(sums.first, bits), add(sums.second, bits);
    if (kSoft) add(sums.labels, bits), add(sums.target, bits);
  }
  return sums;
}

// Adds a row's terms, given its sums about its maximum.
template <class T, bool kSoft>
__device__ void write_terms(const TemperatureRows& args, std::int64_t row, const Sums& sums,
                            const Beta& beta) {
  double target = sums.target;
  if (!kSoft) {
    const std::int64_t label = args.labels[row];
    const bool exists = label >= 0 && label < args.logits.vocab;
    target = exists ? beta.sign * LogitRow<T>(args.logits, row).at(label) -
                          static_cast<double>(reference_of(sums.max))
                    : NAN;
  }
  const double mean = sums.first / sums.weight;  // NaN where there is no weight
  double* terms = args.terms + row;
  terms[0] = sums.weight > 0 ? log(sums.weight) - beta.size * target : NAN;
  terms[args.terms_stride] = beta.sign * (mean - target);
  terms[2 * args.terms_stride] = sums.second / sums.weight - mean * mean;
}

// The columns of a part of a row that a lane reads together: vectors of 16 bytes, each next to those of the
// group's other lanes.
template <class T>
struct Columns {
  static constexpr int kVectors = kHeld / kPerLoad<T>;
  int first, end, lanes;

  __device__ int of(int vector) const { return first + vector * lanes * kPerLoad<T>; }

  // `fill` beyond the end.
  __device__ void read(const T* row, bool aligned, T fill, Vector<T> (&vectors)[kVectors]) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < kPerLoad<T>; ++i) vectors[v].items[i] = fill;
    }
    if (aligned) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (of(v) + kPerLoad<T> <= end) vectors[v] = load_once(row + of(v));
      }
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (of(v) >= end || (aligned && of(v) + kPerLoad<T> <= end)) continue;
#pragma unroll
      for (int i = 0; i < kPerLoad<T>; ++i) {
        if (of(v) + i < end) vectors[v].items[i] = row[of(v) + i];
      }
    }
  }

  __device__ void read_labels(const float* row, float (&labels)[kHeld]) const {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int column = of(i / kPerLoad<T>) + i % kPerLoad<T>;
      labels[i] = column < end ? row[column] : 0.0f;
    }
  }
};

// kPlain: the matrix holds the logits, and nothing is to be done to them. kSoft: labels are probabilities.
template <class T, bool kPlain, bool kSoft>
__global__ void __launch_bounds__(kThreads) read_temperature_rows(TemperatureRows args, int lanes) {
  const std::int64_t vocab = args.logits.vocab, parts = temperature_parts(vocab);
  const std::int64_t group = (static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x) / lanes;
  const bool exists = group < args.logits.n * parts;  // else it helps its warp with a group that does
  const std::int64_t row = (exists ? group : 0) / parts, part = (exists ? group : 0) % parts;
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const std::int64_t start = part * kTemperaturePart;
  const int end = static_cast<int>(vocab - start < kTemperaturePart ? vocab - start : kTemperaturePart);
  const LogitRow<T, kPlain> logits(args.logits, row);
  const Beta beta(*args.beta);
  const T fill = narrowed<T>(beta.sign * -INFINITY);
  const bool aligned = is_aligned(logits.logits);

  Sums sums;
  for (int offset = 0; offset < end; offset += kHeld * lanes) {
    const Columns<T> columns{offset + lane * kPerLoad<T>, end, lanes};
    Vector<T> vectors[Columns<T>::kVectors];
    columns.read(logits.logits + start, aligned, fill, vectors);
    float z[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int column = columns.of(i / kPerLoad<T>) + i % kPerLoad<T>;
      const float element = as_float(vectors[i / kPerLoad<T>].items[i % kPerLoad<T>]);
      z[i] = kPlain || column < end ? beta.sign * logits.finish(element, start + column) : -INFINITY;
    }
    add_logits(sums, z, beta);
    if constexpr (kSoft) {
      const Matrix& labels = args.soft_labels;
      float shares[kHeld];
      columns.read_labels(static_cast<const float*>(labels.data) + row * labels.stride + start, shares);
      add_labels(sums, z, shares);
    }
  }
  const Sums total = group_sums<kSoft>(sums, lanes, beta);
  if (!exists || lane > 0) return;
  if (parts > 1) {
    args.partials[group] = total;
  } else {
    write_terms<T, kSoft>(args, row, total, beta);
  }
}

// A warp for each row: lanes take every 32nd part, then add up.
template <class T, bool kSoft>
__global__ void __launch_bounds__(kWarp) merge_temperature_parts(TemperatureRows args) {
  const std::int64_t row = blockIdx.x, parts = temperature_parts(args.logits.vocab);
  const Sums* partials = args.partials + row * parts;
  const Beta beta(*args.beta);
  float max = -INFINITY;
  for (std::int64_t part = threadIdx.x; part < parts; part += kWarp) max = fmaxf(max, partials[part].max);
  Sums sums;
  sums.max = max;
  for (std::int64_t part = threadIdx.x; part < parts; part += kWarp) {
    const Sums more = moved(partials[part], max, beta);
    sums.weight += more.weight, sums.first += more.first, sums.second += more.second;
    sums.labels += more.labels, sums.target += more.target;
  }
  const Sums total = group_sums<kSoft>(sums, kWarp, beta);
  if (threadIdx.x == 0) write_terms<T, kSoft>(args, row, total, beta);
}

// A block for each of the three: rows are added by every 1024th, then the threads in their order.
constexpr int kMeanThreads = 1024;

__global__ void __launch_bounds__(kMeanThreads) mean_of_terms(TemperatureMeans args) {
  __shared__ double scratch[kMeanThreads / kWarp];
  const double* terms = args.terms + blockIdx.x * args.stride;
  double sum = 0;
  for (std::int64_t row = threadIdx.x; row < args.count; row += kMeanThreads) sum += terms[row];
  sum = block_sum(sum, scratch);
  double* mean = blockIdx.x == 0 ? args.nll : blockIdx.x == 1 ? args.first : args.second;
  if (threadIdx.x == 0) *mean = sum / static_cast<double>(args.count);  // NaN for no rows
}

int lanes_for(std::int64_t vocab) {
  int lanes = 1;
  while (lanes < kWarp && lanes * kHeld < vocab) lanes *= 2;
  return lanes;
}

}  // namespace

void temperature_rows(const TemperatureRows& args, Stream stream) {
  const bool plain = is_plain(args.logits), soft = !args.labels;
  if (soft && !plain) throw std::invalid_argument("soft_labels: expected logits as they are");
  const std::int64_t parts = temperature_parts(args.logits.vocab);
  const int lanes = lanes_for(args.logits.vocab);
  const dim3 blocks(static_cast<unsigned>((args.logits.n * parts * lanes + kThreads - 1) / kThreads));
  for_dtype(args.logits.dtype, [&](auto type) {
    using T = decltype(type);
    const auto read = soft    ? read_temperature_rows<T, true, true>
                      : plain ? read_temperature_rows<T, true, false>
                              : read_temperature_rows<T, false, false>;
    launch(read, blocks, dim3(kThreads), 0, stream, args, lanes);
    if (parts == 1) return;
    launch(soft ? merge_temperature_parts<T, true> : merge_temperature_parts<T, false>,
           dim3(static_cast<unsigned>(args.logits.n)), dim3(kWarp), 0, stream, args);
  });
}

void temperature_means(const TemperatureMeans& args, Stream stream) {
  launch(mean_of_terms, dim3(3), dim3(kMeanThreads), 0, stream, args);
}

}  // namespace pyqe::cuda
