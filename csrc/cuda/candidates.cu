// The largest tokens of a row, exactly, from the maxima of its tiles.
//
// The k-th largest of the tiles' maxima is a lower bound of the k-th largest logit, so only tiles that reach
// it are read again. Rules that ask for probabilities above epsilon need even less: with f the logit of that
// probability, known from the row's sum, the largest tile maximum that is not above f bounds both what is
// above f and the next token after it. For most rows that leaves a few tiles.
#include "cuda/rows.h"

namespace pyqe::cuda {
namespace {

using Key = unsigned long long;  // orders by descending logit, then ascending id; 0 is below all

constexpr int kThreads = 256, kWarps = kThreads / kWarp, kCapacity = 2048, kDigits = 256;

__device__ unsigned ordered(float value) {
  const unsigned bits = bits_of(value + 0.0f);  // -0 is 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ float value_of(unsigned order) {
  return float_from_bits(order & 0x80000000u ? order & 0x7fffffffu : ~order);
}

__device__ Key key_of(float logit, std::int64_t id) {
  return static_cast<Key>(ordered(logit)) << 32 | static_cast<unsigned>(~static_cast<unsigned>(id));
}

struct Shared {
  Key keys[kCapacity];
  double probs[kMaxCandidates];
  float scratch[kWarps];
  int histogram[kDigits];  // by slot_of
  int found;
  long long size;
};

constexpr int kDigitsOfLane = kDigits / kWarp;

// Where a digit is counted: neighbouring lanes read neighbouring words when each adds up its own digits.
__device__ int slot_of(int digit) { return digit % kDigitsOfLane * kWarp + digit / kDigitsOfLane; }

// The digit of the k-th largest of what is counted, found by each warp for itself; k becomes its rank among
// those of that digit.
__device__ int kth_digit(const int* histogram, int& k) {
  const int lane = threadIdx.x % kWarp, top = kDigits - 1 - lane * kDigitsOfLane;
  int counts[kDigitsOfLane], sum = 0;
#pragma unroll
  for (int i = 0; i < kDigitsOfLane; ++i) sum += counts[i] = histogram[slot_of(top - i)];
  int reached = sum;  // with the digits of the lanes before, which are larger
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int before = __shfl_up_sync(kAllLanes, reached, distance);
    if (lane >= distance) reached += before;
  }
  int digit = top, rest = k - (reached - sum);
  const bool here = rest > 0 && rest <= sum;
#pragma unroll
  for (int i = 0; i < kDigitsOfLane - 1; ++i) {
    if (digit == top - i && rest > counts[i]) rest -= counts[i], digit -= 1;
  }
  const int finder = __ffs(static_cast<int>(__ballot_sync(kAllLanes, here))) - 1;
  k = __shfl_sync(kAllLanes, rest, finder);
  return __shfl_sync(kAllLanes, digit, finder);
}

// The k-th largest of the keys, k >= 1, digit by digit from the top; `each` calls its argument for the keys
// of one thread. There must be k keys.
template <class AnyKey, class Each>
__device__ AnyKey kth_largest(const Each& each, int k, Shared& shared) {
  AnyKey prefix = 0;
  for (int shift = static_cast<int>(sizeof(AnyKey)) * 8 - 8; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < kDigits; i += kThreads) shared.histogram[i] = 0;
    __syncthreads();
    each([&](AnyKey key) {
      const bool candidate =
          shift + 8 == static_cast<int>(sizeof(AnyKey)) * 8 || (key ^ prefix) >> (shift + 8) == 0;
      if (candidate) atomicAdd(&shared.histogram[slot_of(static_cast<int>(key >> shift & 0xff))], 1);
    });
    __syncthreads();
    prefix |= static_cast<AnyKey>(kth_digit(shared.histogram, k)) << shift;
    __syncthreads();  // the histogram may be used again
  }
  return prefix;
}

// Descending, of a power of two.
__device__ void sort(Key* keys, int count) {
  for (int size = 2; size <= count; size *= 2) {
    for (int stride = size / 2; stride > 0; stride /= 2) {
      __syncthreads();
      for (int i = threadIdx.x; i < count / 2; i += kThreads) {
        const int low = 2 * i - (i & (stride - 1)), high = low + stride;
        const Key a = keys[low], b = keys[high];
        if ((a < b) == ((low & size) == 0)) keys[low] = b, keys[high] = a;
      }
    }
  }
  __syncthreads();
}

template <class T>
class Selection {
 public:
  __device__ Selection(const Candidates& args, std::int64_t row, Shared& shared)
      : args_(args), shared_(shared), row_(row), logits_(args.logits, row), vocab_(args.logits.vocab) {
    tiles_ = tiles_of(vocab_);
    tile_max_ = args.tile_max + row * tiles_;
  }

  // Puts the largest into shared.keys, sorted; those that the rule or top_k need are all there.
  __device__ int run() {
    const std::int64_t members = args_.rule.kind == DominantKind::kNone ? 0 : args_.members + 1;
    const int wanted = static_cast<int>(min64(args_.top_k > members ? args_.top_k : members, vocab_));
    const float bound = lower_bound(min64(args_.top_k, vocab_), min64(members, vocab_));
    int found = collect(key_of(bound, vocab_));
    if (found > kCapacity) {
      const Key least =
          kth_largest<Key>([&](const auto& body) { each_key(key_of(bound, vocab_), body); }, wanted, shared_);
      found = collect(least);
    }
    int padded = 2;
    while (padded < found) padded *= 2;
    for (int i = found + threadIdx.x; i < padded; i += kThreads) shared_.keys[i] = 0;
    sort(shared_.keys, padded);
    return found;
  }

  __device__ static float logit_of(Key key) { return value_of(static_cast<unsigned>(key >> 32)); }
  __device__ static std::int64_t id_of(Key key) { return static_cast<unsigned>(~static_cast<unsigned>(key)); }

 private:
  __device__ static std::int64_t min64(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

  __device__ float kth_tile(std::int64_t k) const {
    if (k >= tiles_) return -INFINITY;
    const auto maxima = [&](const auto& body) {
      for (std::int64_t i = threadIdx.x; i < tiles_; i += kThreads) body(ordered(tile_max_[i]));
    };
    return value_of(kth_largest<unsigned>(maxima, static_cast<int>(k), shared_));
  }

  __device__ float lower_bound(std::int64_t top_k, std::int64_t members) const {
    float bound = INFINITY;
    if (top_k > 0) bound = kth_tile(top_k);
    if (members > 0) {
      float of_rule = kth_tile(members);
      if (args_.rule.kind == DominantKind::kJump || args_.rule.kind == DominantKind::kEpsilon) {
        // a little lower than the logit of epsilon: rounding must not decide
        const float floor = args_.max_logit[row_] - args_.max_logprob[row_] +
                            static_cast<float>(log(args_.rule.epsilon)) - 1e-3f;
        float below = -INFINITY;
        for (std::int64_t i = threadIdx.x; i < tiles_; i += kThreads) {
          if (tile_max_[i] <= floor) below = fmaxf(below, tile_max_[i]);
        }
        of_rule = fmaxf(of_rule, block_max(below, shared_.scratch));
      }
      bound = fminf(bound, of_rule);
    }
    return bound;
  }

  // body(key) for the logits of this thread whose keys are at least `least`.
  template <class Body>
  __device__ void each_key(Key least, const Body& body) const {
    const float bound = logit_of(least);
    for (std::int64_t tile = threadIdx.x / kWarp; tile < tiles_; tile += kWarps) {
      if (!(tile_max_[tile] >= bound)) continue;
      const std::int64_t column = tile * kTile + threadIdx.x % kWarp * 8;
      float z[8];
      logits_.eight(column, z);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (column + i >= vocab_) break;
        if (args_.second.scale) z[i] = CorrectedRow(args_.second, row_, vocab_).of(z[i], column + i);
        const Key key = key_of(z[i], column + i);
        if (key >= least) body(key);
      }
    }
  }

  // How many keys there are; the first of them, up to the capacity, are in shared.keys.
  __device__ int collect(Key least) {
    if (threadIdx.x == 0) shared_.found = 0;
    __syncthreads();
    each_key(least, [&](Key key) {
      const int slot = atomicAdd(&shared_.found, 1);
      if (slot < kCapacity) shared_.keys[slot] = key;
    });
    __syncthreads();
    const int found = shared_.found;
    __syncthreads();
    return found;
  }

  const Candidates& args_;
  Shared& shared_;
  std::int64_t row_;
  LogitRow<T> logits_;
  std::int64_t vocab_, tiles_;
  const float* tile_max_;
};

// The size of the dominant set of a row, from its largest tokens.
__device__ void write_dominant(const Candidates& args, std::int64_t row, int found, Shared& shared) {
  const double max = args.max_logit[row], max_logprob = args.max_logprob[row];
  const std::int64_t limit = args.members + 1;
  const int count = static_cast<int>(found < limit ? found : limit);
  for (int i = threadIdx.x; i < count; i += kThreads) {
    shared.probs[i] = exp(Selection<float>::logit_of(shared.keys[i]) - max + max_logprob);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    // tokens of probability 0 by a logit of -infinity are no candidates, but the last drop is measured
    // against them
    int possible = count;
    while (possible > 0 && Selection<float>::logit_of(shared.keys[possible - 1]) == -INFINITY) --possible;
    const bool all = possible == args.logits.vocab;
    int members = possible;
    if (!all && possible == count) members -= 1;
    const double next = all ? NAN : possible < count ? 0.0 : shared.probs[members];
    const std::int64_t size =
        dominant_size(args.rule, shared.probs, members, next, NAN, args.logits.vocab);  // bounded: no entropy
    double mass = 0;
    for (std::int64_t i = 0; i < size; ++i) mass += shared.probs[i];
    shared.size = size;
    args.size[row] = size;
    args.mass[row] = static_cast<float>(mass);
  }
  __syncthreads();
  for (std::int64_t i = threadIdx.x; i < args.members; i += kThreads) {
    args.dominant_ids[row * args.members + i] =
        i < shared.size ? Selection<float>::id_of(shared.keys[i]) : -1;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) find_candidates(Candidates args) {
  __shared__ Shared shared;
  const std::int64_t row = blockIdx.x;
  const bool valid = !std::isnan(args.max_logit[row]), rule = args.rule.kind != DominantKind::kNone;
  const int found = valid ? Selection<T>(args, row, shared).run() : 0;
  for (std::int64_t i = threadIdx.x; i < args.top_k; i += kThreads) {
    args.topk_logits[row * args.top_k + i] = valid ? Selection<T>::logit_of(shared.keys[i]) : NAN;
    args.topk_ids[row * args.top_k + i] = valid ? Selection<T>::id_of(shared.keys[i]) : -1;
  }
  if (!rule) return;
  if (valid) return write_dominant(args, row, found, shared);
  for (std::int64_t i = threadIdx.x; i < args.members; i += kThreads)
    args.dominant_ids[row * args.members + i] = -1;
  if (threadIdx.x == 0) args.size[row] = 0, args.mass[row] = NAN;
}

}  // namespace

void row_candidates(const Candidates& args, Stream stream) {
  for_dtype(args.logits.dtype, [&](auto type) {
    launch(find_candidates<decltype(type)>, dim3(static_cast<unsigned>(args.logits.n)), dim3(kThreads), 0,
           stream, args);
  });
}

}  // namespace pyqe::cuda
