// One block reads one segment of one row, once, into registers: 8 tokens at a time for each lane, a tile of
// 256 for a warp, four tiles for each warp. The maximum of the segment comes first, so that its exponentials
// are taken relative to it and nothing is rescaled; then a second kernel, a warp for each row, merges the
// segments.
//
// Bytes decide: at 3.35 TB/s of bf16 an H100 has 17 instructions for each logit. Softmax statistics take
// about 8 (widen, maximum, subtract, scale, exponential, add, and two for the entropy).
#include "cuda/rows.h"

namespace pyqe::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp, kTilesOfWarp = kSegment / kTile / kWarps;
constexpr int kHeld = kTilesOfWarp * 8;  // logits that a thread holds

struct Position {
  std::int64_t row, segment, tiles;

  __device__ explicit Position(const Logits& logits)
      : row(blockIdx.x / segments_of(logits.vocab)),
        segment(blockIdx.x % segments_of(logits.vocab)),
        tiles(tiles_of(logits.vocab)) {}
  __device__ std::int64_t tile(int i) const {
    return segment * (kSegment / kTile) + i * kWarps + threadIdx.x / kWarp;
  }
  __device__ std::int64_t column(int i) const { return tile(i) * kTile + threadIdx.x % kWarp * 8; }
};

// The largest of what a thread holds; -infinity if that is nothing or NaN alone.
__device__ float largest(const float (&z)[kHeld]) {
  float result = -INFINITY;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) result = fmaxf(result, z[i]);
  return result;
}

__device__ void write_tile_max(const Position& at, const float (&z)[kHeld], float* tile_max) {
#pragma unroll
  for (int i = 0; i < kTilesOfWarp; ++i) {
    float largest = -INFINITY;
#pragma unroll
    for (int j = 0; j < 8; ++j) largest = fmaxf(largest, z[i * 8 + j]);
    largest = warp_max(largest);
    if (threadIdx.x % kWarp == 0 && at.tile(i) < at.tiles) tile_max[at.row * at.tiles + at.tile(i)] = largest;
  }
}

// The first token whose logit is `max`, which is the segment's; INT64_MAX where all are NaN.
__device__ std::int64_t first_at(const Position& at, const float (&z)[kHeld], float thread_max, float max,
                                 int* scratch) {
  int first = kSegment;  // counted from the start of the segment
  if (thread_max == max) {
    const int start = static_cast<int>(at.column(0) - at.segment * kSegment);
#pragma unroll
    for (int i = kHeld - 1; i >= 0; --i) {
      if (z[i] == max) first = start + i / 8 * (kWarps * kTile) + i % 8;
    }
  }
  const auto smaller = [](int a, int b) { return a < b ? a : b; };
  const auto within_warp = [&](int value) {
    for (int bits = kWarp / 2; bits > 0; bits /= 2) {
      value = smaller(value, __shfl_xor_sync(kAllLanes, value, bits));
    }
    return value;
  };
  first = block_reduce(first, scratch, within_warp, smaller);
  return first < kSegment ? at.segment * kSegment + first : INT64_MAX;
}

// Sums of all threads, in the order of warps; whole in thread 0 alone.
__device__ void add_up(float (&sums)[3], float (*scratch)[3]) {
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    sums[i] = warp_sum(sums[i]);
    if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp][i] = sums[i];
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kWarps; ++warp) {
#pragma unroll
      for (int i = 0; i < 3; ++i) sums[i] += scratch[warp][i];
    }
  }
  __syncthreads();
}

struct Shared {
  float max[kWarps];
  float sums[kWarps][3];
  int ids[kWarps];
};

__device__ void softmax_segment(const SoftmaxRequest& request, const Position& at, const float (&z)[kHeld],
                                std::int64_t vocab, Shared& shared) {
  if (request.tile_max) write_tile_max(at, z, request.tile_max);
  const float thread_max = largest(z), max = block_max(thread_max, shared.max);
  const std::int64_t argmax = first_at(at, z, thread_max, max, shared.ids);
  float sums[3] = {};     // e^d, d e^d, e^(d / T)
  if (max > -INFINITY) {  // else there is no d
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const float d = z[i] - max, power = fast_exp(d);
      sums[0] += power;
      if (request.entropy) sums[1] += fmaxf(d, -200.0f) * power;  // -infinity times 0 would be NaN
      if (request.tempered) sums[2] += fast_exp(d * request.inverse_temperature);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (z[i] != z[i]) sums[0] = NAN;
    }
  }
  add_up(sums, shared.sums);
  if (threadIdx.x == 0) {
    request.partials[at.row * segments_of(vocab) + at.segment] = {max, argmax, sums[0], sums[1], sums[2]};
  }
}

__device__ void sigmoid_segment(const SigmoidRequest& request, const Position& at, const float (&z)[kHeld],
                                std::int64_t vocab, Shared& shared) {
  if (request.tile_max) write_tile_max(at, z, request.tile_max);
  const float thread_max = largest(z), max = block_max(thread_max, shared.max);
  const std::int64_t argmax = first_at(at, z, thread_max, max, shared.ids);
  float sums[3] = {};  // probabilities, tokens above the threshold
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    sums[0] += fast_sigmoid(z[i]);
    sums[1] += z[i] > request.threshold ? 1.0f : 0.0f;
  }
  add_up(sums, shared.sums);
  if (threadIdx.x == 0) {
    request.partials[at.row * segments_of(vocab) + at.segment] = {
        max, argmax, static_cast<std::int64_t>(sums[1]), sums[0]};
  }
}

// With a second head, its logits are made of the first one's where those are at hand.
template <class T, bool kPlain, bool kSecond>
__global__ void __launch_bounds__(kThreads, 3) read_segments(Statistics args) {
  __shared__ Shared shared;
  const std::int64_t vocab = args.logits.vocab;
  const Position at(args.logits);
  const LogitRow<T, kPlain> row(args.logits, at.row);
  float z[kHeld];
  row.template several<kTilesOfWarp>(at.column(0), kWarps * kTile, z);
  if (args.softmax.partials) softmax_segment(args.softmax, at, z, vocab, shared);
  if (!args.sigmoid.partials) return;
  if (kSecond) {
    const CorrectedRow second(args.second, at.row, vocab);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const std::int64_t column = at.column(i / 8) + i % 8;
      z[i] = column < vocab ? second.of(z[i], column) : -INFINITY;
    }
  }
  sigmoid_segment(args.sigmoid, at, z, vocab, shared);
}

template <class Partial>
struct Parts {
  const Partial* first;
  std::int64_t count;

  // body(part) for the lane's share of the segments
  template <class Body>
  __device__ void each(const Body& body) const {
    for (std::int64_t i = threadIdx.x; i < count; i += kWarp) body(first[i]);
  }
  // The largest maximum, and the first token that has it.
  __device__ void find_max(float& max, std::int64_t& argmax) const {
    max = -INFINITY;
    each([&](const Partial& part) { max = fmaxf(max, part.max); });
    max = warp_max(max);
    argmax = INT64_MAX;
    each([&](const Partial& part) {
      if (part.max == max && part.argmax < argmax) argmax = part.argmax;
    });
    for (int bits = kWarp / 2; bits > 0; bits /= 2) {
      const std::int64_t other = __shfl_xor_sync(kAllLanes, argmax, bits);
      if (other < argmax) argmax = other;
    }
  }
};

// Logits of the ids that were asked for, NaN for those out of range and for rows that are not valid.
template <class LogitOf>
__device__ void gather(const Statistics& args, std::int64_t row, bool valid, float* out,
                       const LogitOf& logit_of) {
  const std::int64_t* ids = args.token_ids + row * args.n_tokens;
  for (std::int64_t k = threadIdx.x; k < args.n_tokens; k += kWarp) {
    const bool found = valid && ids[k] >= 0 && ids[k] < args.logits.vocab;
    out[row * args.n_tokens + k] = found ? logit_of(ids[k]) : NAN;
  }
}

template <class T>
__device__ void finish_softmax(const Statistics& args, std::int64_t row) {
  const SoftmaxRequest& request = args.softmax;
  const std::int64_t segments = segments_of(args.logits.vocab);
  const Parts<SoftmaxPartial> parts{request.partials + row * segments, segments};
  SoftmaxPartial total;
  parts.find_max(total.max, total.argmax);
  total.sum = total.weighted = total.tempered = 0;
  parts.each([&](SoftmaxPartial part) {
    rebase(part, total.max, request.inverse_temperature);
    total.sum += part.sum, total.weighted += part.weighted, total.tempered += part.tempered;
  });
  total.sum = warp_sum(total.sum), total.weighted = warp_sum(total.weighted);
  total.tempered = warp_sum(total.tempered);
  const bool valid = is_distribution(total);
  if (threadIdx.x == 0) {
    request.max_logit[row] = valid ? total.max : NAN;
    request.max_logprob[row] = valid ? static_cast<float>(-log(total.sum)) : NAN;
    request.argmax[row] = valid ? total.argmax : -1;
    if (request.entropy) request.entropy[row] = valid ? static_cast<float>(entropy_of(total)) : NAN;
    if (request.tempered) {
      const double largest = static_cast<double>(total.max) * request.inverse_temperature;
      request.tempered[row] = valid ? static_cast<float>(largest + log(total.tempered)) : NAN;
    }
  }
  if (args.n_tokens == 0) return;
  const LogitRow<T> logits(args.logits, row);
  gather(args, row, valid, args.softmax_tokens, [&](std::int64_t id) { return logits.at(id); });
}

template <class T>
__device__ void finish_sigmoid(const Statistics& args, std::int64_t row) {
  const SigmoidRequest& request = args.sigmoid;
  const std::int64_t segments = segments_of(args.logits.vocab);
  const Parts<SigmoidPartial> parts{request.partials + row * segments, segments};
  SigmoidPartial total;
  parts.find_max(total.max, total.argmax);
  total.sum = 0, total.above = 0;
  parts.each([&](const SigmoidPartial& part) { total.sum += part.sum, total.above += part.above; });
  total.sum = warp_sum(total.sum), total.above = warp_sum(total.above);
  const bool valid = !std::isnan(total.sum);
  if (threadIdx.x == 0) {
    request.max_logit[row] = valid ? total.max : NAN;
    request.argmax[row] = valid ? total.argmax : -1;
    request.sum_prob[row] = static_cast<float>(total.sum);
    if (request.above) request.above[row] = valid ? total.above : -1;
  }
  if (args.n_tokens == 0) return;
  const LogitRow<T> logits(args.logits, row);
  if (!args.second.scale) {
    return gather(args, row, valid, args.sigmoid_tokens, [&](std::int64_t id) { return logits.at(id); });
  }
  const CorrectedRow second(args.second, row, args.logits.vocab);
  gather(args, row, valid, args.sigmoid_tokens,
         [&](std::int64_t id) { return second.of(logits.at(id), id); });
}

template <class T>
__global__ void __launch_bounds__(kWarp) finish_rows(Statistics args) {
  if (args.softmax.partials) finish_softmax<T>(args, blockIdx.x);
  if (args.sigmoid.partials) finish_sigmoid<T>(args, blockIdx.x);
}

}  // namespace

void row_statistics(const Statistics& args, Stream stream) {
  const dim3 blocks(static_cast<unsigned>(args.logits.n * segments_of(args.logits.vocab)));
  for_dtype(args.logits.dtype, [&](auto type) {
    using T = decltype(type);
    const auto read = args.second.scale       ? read_segments<T, false, true>
                      : is_plain(args.logits) ? read_segments<T, true, false>
                                              : read_segments<T, false, false>;
    launch(read, blocks, dim3(kThreads), 0, stream, args);
    launch(finish_rows<T>, dim3(static_cast<unsigned>(args.logits.n)), dim3(kWarp), 0, stream, args);
  });
}

}  // namespace pyqe::cuda
