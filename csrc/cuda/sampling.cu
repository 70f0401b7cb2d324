// A token is drawn by inversion in two stages: a tile of kTile tokens by the tiles' sums, then a token of
// that tile, whose logits are read again. So a row is read once, there is no random number for each logit,
// and cumulative sums, which need double precision, are as many as there are tiles.
//
// Drawing with replacement and passing over what was drawn before is drawing without replacement. A row that
// has not got enough after a round goes on with weight zero for what it holds, which is the same distribution
// again. A block does that for its row, so the host need not know how many rounds there were.
//
// The numbers and what they stand for are those of the reference backend: both draw the same tokens but for
// rounding.
#include "core/philox.h"
#include "cuda/rows.h"
#include "cuda/sampling.h"

namespace pyqe::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp, kSegmentWords = kSegment / 32;
constexpr int kTilesOfWarp = kSegment / kTile / kWarps;
static_assert(kSegmentWords == kThreads, "a thread clears one word");
static_assert(kTile == kWarp * 8, "eight tokens for each lane");

__device__ bool is_sampled(const SampleNegatives& args, std::int64_t row) {
  const std::int64_t target = args.targets[row];
  const float max = args.max_logit[row];
  return !std::isnan(max) && target >= -1 && target < args.logits.vocab;
}

// --- weights of a tile ---

// The tokens of a tile that one lane of a warp has: eight in a row, and which of them are not to be drawn.
struct Lane {
  std::int64_t column;
  unsigned barred;

  // `words` are those of the tile.
  __device__ Lane(std::int64_t tile, const unsigned* words)
      : column(tile * kTile + threadIdx.x % kWarp * 8),
        barred(words[threadIdx.x % kWarp / 4] >> threadIdx.x % 4 * 8 & 0xffu) {}
  __device__ bool allows(int i) const { return (barred >> i & 1u) == 0; }
};

// -infinity for what has no weight
__device__ void bar(const SampleNegatives& args, const Lane& lane, float (&z)[8]) {
  if (lane.barred == 0 && !args.factor) return;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (!lane.allows(i) || (args.factor && args.factor[lane.column + i] == 0)) z[i] = -INFINITY;
  }
}

// In place of logits as `bar` leaves them: e^((z - max) beta) factor, max > -infinity.
__device__ void softmax_weights(const SampleNegatives& args, const Lane& lane, float max, float (&z)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) z[i] = fast_exp((z[i] - max) * args.beta);
  if (!args.factor) return;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (lane.allows(i)) z[i] *= args.factor[lane.column + i];
  }
}

// Of logits as `bar` leaves them; they become weights.
__device__ TileSum sum_tile(const SampleNegatives& args, const Lane& lane, float (&z)[8]) {
  float max = -INFINITY, sum = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) max = fmaxf(max, z[i]);
  max = warp_max(max);
  if (max == -INFINITY) return {max, 0};
  softmax_weights(args, lane, max, z);
#pragma unroll
  for (int i = 0; i < 8; ++i) sum += z[i];
  return {max, warp_sum(sum)};
}

// --- first kernel: what must not be drawn, and the sums of the tiles ---

// Marks of a segment: the target, the dominant tokens, and what lies beyond the vocabulary.
__device__ void bar_segment(const SampleNegatives& args, std::int64_t row, std::int64_t first,
                            unsigned* barred) {
  const std::int64_t left = args.logits.vocab - first - threadIdx.x * 32;
  barred[threadIdx.x] = left >= 32 ? 0u : left <= 0 ? ~0u : ~0u << left;
  __syncthreads();
  const auto mark = [&](std::int64_t id) {
    const std::int64_t at = id - first;
    if (at >= 0 && at < kSegment) atomicOr(&barred[at / 32], 1u << at % 32);
  };
  if (threadIdx.x == 0 && args.targets[row] >= 0) mark(args.targets[row]);
  const std::int64_t* excluded = args.excluded + row * args.n_excluded;
  for (std::int64_t i = threadIdx.x; i < args.n_excluded && excluded[i] >= 0; i += kThreads)
    mark(excluded[i]);
  __syncthreads();
}

// A block for each segment of a row.
template <class T, bool kPlain>
__global__ void __launch_bounds__(kThreads, 3) sum_tiles(SampleNegatives args) {
  __shared__ unsigned barred[kSegmentWords];
  const std::int64_t segments = segments_of(args.logits.vocab), tiles = tiles_of(args.logits.vocab);
  const std::int64_t row = blockIdx.x / segments, segment = blockIdx.x % segments;
  if (!is_sampled(args, row)) return;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const std::int64_t first_tile = segment * (kSegment / kTile);
  float z[kTilesOfWarp * 8];
  if (args.tile_sums) {
    const LogitRow<T, kPlain> logits(args.logits, row);
    logits.template several<kTilesOfWarp>((first_tile + warp) * kTile + lane * 8, kWarps * kTile, z);
  }
  bar_segment(args, row, segment * kSegment, barred);
  const std::int64_t word = segment * kSegmentWords + threadIdx.x;
  if (word < tiles * kTileWords) args.barred[row * tiles * kTileWords + word] = barred[threadIdx.x];
  if (!args.tile_sums) return;
#pragma unroll
  for (int i = 0; i < kTilesOfWarp; ++i) {
    const int in_segment = i * kWarps + warp;
    if (first_tile + in_segment >= tiles) break;
    const Lane tokens(first_tile + in_segment, barred + in_segment * kTileWords);
    float(&of_tile)[8] = reinterpret_cast<float(&)[8]>(z[i * 8]);
    bar(args, tokens, of_tile);
    const TileSum sum = sum_tile(args, tokens, of_tile);
    if (lane == 0) args.tile_sums[row * tiles + first_tile + in_segment] = sum;
  }
}

// --- second kernel: the draws of a source ---

struct ForReductions {
  double sums[kWarps];
  float max[kWarps];
};

// Shared memory of a row's block.
struct Scratch {
  double* cumulative;  // [tiles]: weights of the tiles up to each
  double* counts;      // [tiles]: sums of what may be drawn
  TileSum* sums;       // [tiles]: of what may be drawn
  int* open;           // [tiles]: tokens that may be drawn
  int* drawn;          // [draws of a round]: ids, -1 for nothing
  int* fresh;          // [draws of a round]: 1 where an id is drawn for the first time

  static std::size_t bytes(std::int64_t tiles, std::int64_t per_round) {
    return static_cast<std::size_t>(tiles) * (2 * sizeof(double) + sizeof(TileSum) + sizeof(int)) +
           static_cast<std::size_t>(per_round) * 2 * sizeof(int);
  }
  __device__ Scratch(std::int64_t tiles, std::int64_t per_round) {
    cumulative = dynamic_shared<double>();
    counts = cumulative + tiles;
    sums = reinterpret_cast<TileSum*>(counts + tiles);
    open = reinterpret_cast<int*>(sums + tiles);
    drawn = open + tiles;
    fresh = drawn + per_round;
  }
};

template <class T>
class RowSampler {
 public:
  __device__ RowSampler(const SampleNegatives& args, const Source& source, std::int64_t row,
                        std::int64_t* ids, ForReductions& reductions)
      : args_(args),
        source_(source),
        row_(row),
        tiles_(tiles_of(args.logits.vocab)),
        per_round_(source.count + kSpareDraws),
        logits_(args.logits, row),
        barred_(args.barred + row * tiles_ * kTileWords),
        ids_(ids),
        shared_(tiles_, per_round_),
        reductions_(reductions) {}

  __device__ void run(std::uint32_t stream) {
    load_tiles();
    normalise();
    for (std::int64_t round = 0; round < source_.count && filled_ < source_.count; ++round) {
      if (round > 0) bar_drawn();
      const double total = accumulate();
      if (!(total > 0)) break;
      draw(total, stream, round * per_round_);
      accept();
    }
    for (std::int64_t i = threadIdx.x; i < source_.count; i += kThreads) {
      if (i < barred_ids_) atomicAnd(&barred_[ids_[i] / 32], ~(1u << ids_[i] % 32));  // for other sources
      if (i >= filled_) ids_[i] = -1;
    }
  }

 private:
  __device__ static int warp() { return threadIdx.x / kWarp; }
  __device__ static int lane() { return threadIdx.x % kWarp; }

  __device__ Lane tokens(std::int64_t tile) const { return Lane(tile, barred_ + tile * kTileWords); }

  __device__ void read_logits(const Lane& tokens, float (&z)[8]) const {
    logits_.eight(tokens.column, z);
    bar(args_, tokens, z);
  }

  __device__ double sum_counts(const Lane& tokens) const {
    double sum = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += tokens.allows(i) ? args_.counts[tokens.column + i] : 0.0;
    return warp_sum(sum);
  }

  __device__ void load_tiles() {
    for (std::int64_t tile = threadIdx.x; tile < tiles_; tile += kThreads) {
      int open = kTile;
#pragma unroll
      for (int i = 0; i < kTileWords; ++i) open -= __popc(barred_[tile * kTileWords + i]);
      shared_.open[tile] = open;
      if (source_.softmax > 0) shared_.sums[tile] = args_.tile_sums[row_ * tiles_ + tile];
      if (source_.unigram > 0) shared_.counts[tile] = args_.tile_counts[tile];
    }
    __syncthreads();
    if (source_.unigram == 0) return;
    for (std::int64_t tile = warp(); tile < tiles_; tile += kWarps) {
      if (shared_.open[tile] == kTile) continue;
      const double sum = sum_counts(tokens(tile));
      if (lane() == 0) shared_.counts[tile] = sum;
    }
    __syncthreads();
  }

  // e^((max - best) beta): what the weights of a tile, which are relative to its own maximum, are times.
  __device__ double tile_factor(const TileSum& tile) const {
    return tile.sum > 0 ? exp((static_cast<double>(tile.max) - best_) * args_.beta) : 0.0;
  }

  // body(tile) added up for all tiles, in the same order always.
  template <class Body>
  __device__ double sum_tiles(const Body& body) const {
    double sum = 0;
    for (std::int64_t tile = threadIdx.x; tile < tiles_; tile += kThreads) sum += body(tile);
    return block_sum(sum, reductions_.sums);
  }

  // The weights of the parts, divided by their sums.
  __device__ void normalise() {
    const auto share = [](double weight, double sum) { return sum > 0 ? weight / sum : 0.0; };
    if (source_.softmax > 0) {
      float best = -INFINITY;
      for (std::int64_t tile = threadIdx.x; tile < tiles_; tile += kThreads)
        best = fmaxf(best, shared_.sums[tile].max);
      best_ = block_max(best, reductions_.max);
      softmax_ = share(source_.softmax, sum_tiles([&](std::int64_t tile) {
                         return shared_.sums[tile].sum * tile_factor(shared_.sums[tile]);
                       }));
    }
    if (source_.unigram > 0)
      unigram_ = share(source_.unigram, sum_tiles([&](std::int64_t tile) { return shared_.counts[tile]; }));
    if (source_.uniform > 0) {
      uniform_ = share(source_.uniform,
                       sum_tiles([&](std::int64_t tile) { return static_cast<double>(shared_.open[tile]); }));
    }
  }

  __device__ double tile_weight(std::int64_t tile) const {
    double weight = uniform_ * shared_.open[tile];
    if (unigram_ > 0) weight += unigram_ * shared_.counts[tile];
    if (softmax_ > 0) weight += softmax_ * shared_.sums[tile].sum * tile_factor(shared_.sums[tile]);
    return weight;
  }

  // Cumulative weights of the tiles; returns the last.
  __device__ double accumulate() {
    const std::int64_t each = (tiles_ + kThreads - 1) / kThreads, begin = threadIdx.x * each;
    const std::int64_t end = begin + each < tiles_ ? begin + each : tiles_;
    double own = 0;
    for (std::int64_t tile = begin; tile < end; ++tile) {
      own += tile_weight(tile);
      shared_.cumulative[tile] = own;
    }
    const double upto = warp_cumulative(own);
    if (lane() == kWarp - 1) reductions_.sums[warp()] = upto;
    const double in_warp = __shfl_up_sync(kAllLanes, upto, 1);
    double before = lane() == 0 ? 0.0 : in_warp;
    __syncthreads();
    for (int i = 0; i < warp(); ++i) before += reductions_.sums[i];
    for (std::int64_t tile = begin; tile < end; ++tile) shared_.cumulative[tile] += before;
    __syncthreads();
    return shared_.cumulative[tiles_ - 1];
  }

  __device__ static double warp_cumulative(double value) {
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const double other = __shfl_up_sync(kAllLanes, value, distance);
      if (lane() >= distance) value += other;
    }
    return value;
  }

  // Ids of a round into shared memory, a warp for each.
  __device__ void draw(double total, std::uint32_t stream, std::int64_t first_draw) {
    const std::int64_t seed = args_.seed_at ? *args_.seed_at : args_.seed;
    for (std::int64_t k = warp(); k < per_round_; k += kWarps) {
      const double number = uniform(static_cast<std::uint64_t>(seed), stream,
                                    static_cast<std::uint64_t>(args_.first_row + row_),
                                    static_cast<std::uint32_t>(first_draw + k));
      const double value = below(number * total, total);
      const std::int64_t tile = find_tile(value);
      const int id = find_in_tile(tile, tile > 0 ? value - shared_.cumulative[tile - 1] : value);
      if (lane() == 0) shared_.drawn[k] = id;
    }
    __syncthreads();
  }

  // The first tile whose cumulative weight is above the value.
  __device__ std::int64_t find_tile(double value) const {
    std::int64_t low = 0, high = tiles_ - 1;
    while (low < high) {
      const std::int64_t middle = (low + high) / 2;
      if (shared_.cumulative[middle] > value)
        high = middle;
      else
        low = middle + 1;
    }
    return low;
  }

  __device__ void token_weights(std::int64_t tile, const Lane& tokens, double (&weights)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const bool counted = unigram_ > 0 && tokens.allows(i);
      weights[i] = tokens.allows(i) ? uniform_ : 0.0;
      if (counted) weights[i] += unigram_ * args_.counts[tokens.column + i];
    }
    const double softmax = softmax_ > 0 ? softmax_ * tile_factor(shared_.sums[tile]) : 0.0;
    if (softmax == 0) return;
    float z[8];
    read_logits(tokens, z);
    softmax_weights(args_, tokens, shared_.sums[tile].max, z);
#pragma unroll
    for (int i = 0; i < 8; ++i) weights[i] += softmax * z[i];
  }

  // The token at `value` of the cumulative weights of one tile; -1 where none has any.
  __device__ int find_in_tile(std::int64_t tile, double value) const {
    const Lane tokens = this->tokens(tile);
    double weights[8], own = 0;
    token_weights(tile, tokens, weights);
#pragma unroll
    for (int i = 0; i < 8; ++i) own += weights[i];
    const double upto = warp_cumulative(own), before = __shfl_up_sync(kAllLanes, upto, 1);
    const double total = __shfl_sync(kAllLanes, upto, kWarp - 1);
    if (!(total > 0)) return -1;
    value = below(value, total);
    const int found = __ffs(static_cast<int>(__ballot_sync(kAllLanes, upto > value))) - 1;
    double reached = lane() == 0 ? 0.0 : before;
    int id = -1;
    bool passed = false;  // by rounding, a lane's last token may have to stand in for its sum
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      reached += weights[i];
      if (weights[i] > 0 && !passed) id = static_cast<int>(tokens.column) + i;
      if (reached > value) passed = true;
    }
    return __shfl_sync(kAllLanes, id, found);
  }

  // Takes the ids that are drawn for the first time, in the order of the draws, until there are enough.
  __device__ void accept() {
    for (std::int64_t k = threadIdx.x; k < per_round_; k += kThreads) {
      int fresh = shared_.drawn[k] >= 0;
      for (std::int64_t j = 0; j < k; ++j) fresh &= shared_.drawn[j] != shared_.drawn[k];
      shared_.fresh[k] = fresh;
    }
    __syncthreads();
    for (std::int64_t k = threadIdx.x; k < per_round_; k += kThreads) {
      std::int64_t place = filled_;
      for (std::int64_t j = 0; j < k; ++j) place += shared_.fresh[j];
      if (shared_.fresh[k] && place < source_.count) ids_[place] = shared_.drawn[k];
    }
    for (std::int64_t k = 0; k < per_round_; ++k) filled_ += shared_.fresh[k];
    filled_ = filled_ < source_.count ? filled_ : source_.count;
    __syncthreads();
  }

  // What the row holds is not drawn again; sums the tiles anew that change.
  __device__ void bar_drawn() {
    for (std::int64_t i = barred_ids_ + threadIdx.x; i < filled_; i += kThreads)
      atomicOr(&barred_[ids_[i] / 32], 1u << ids_[i] % 32);
    __syncthreads();
    for (std::int64_t i = barred_ids_ + warp(); i < filled_; i += kWarps) {
      const std::int64_t tile = ids_[i] / kTile;
      bool first = true;
      for (std::int64_t j = barred_ids_; j < i; ++j) first = first && ids_[j] / kTile != tile;
      if (first) sum_again(tile);
    }
    barred_ids_ = filled_;
    __syncthreads();
  }

  __device__ void sum_again(std::int64_t tile) {
    const Lane tokens = this->tokens(tile);
    const int open = warp_sum(8 - __popc(tokens.barred));
    TileSum sum = {};
    if (softmax_ > 0) {
      float z[8];
      read_logits(tokens, z);
      sum = sum_tile(args_, tokens, z);
    }
    const double counts = unigram_ > 0 ? sum_counts(tokens) : 0.0;
    if (lane() > 0) return;
    shared_.open[tile] = open, shared_.sums[tile] = sum, shared_.counts[tile] = counts;
  }

  const SampleNegatives& args_;
  const Source& source_;
  std::int64_t row_, tiles_, per_round_;
  LogitRow<T> logits_;
  unsigned* barred_;
  std::int64_t* ids_;
  Scratch shared_;
  ForReductions& reductions_;
  double best_ = 0;                                 // largest logit that may be drawn
  double softmax_ = 0, unigram_ = 0, uniform_ = 0;  // weights of the parts, divided by their sums
  std::int64_t filled_ = 0, barred_ids_ = 0;
};

// A block for each row. What an earlier source has drawn, in the columns before, is dropped.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    draw_tokens(SampleNegatives args, Source source, std::uint32_t stream, std::int64_t column) {
  __shared__ ForReductions reductions;
  const std::int64_t row = blockIdx.x;
  std::int64_t* all = args.ids + row * args.width;
  std::int64_t* ids = all + column;
  if (is_sampled(args, row)) {
    RowSampler<T>(args, source, row, ids, reductions).run(stream);
  } else {
    for (std::int64_t i = threadIdx.x; i < source.count; i += kThreads) ids[i] = -1;
  }
  __syncthreads();
  for (std::int64_t i = threadIdx.x; i < source.count; i += kThreads) {
    for (std::int64_t j = 0; j < column; ++j) {
      if (all[j] == ids[i]) ids[i] = -1;
    }
  }
}

}  // namespace

void sample_negatives(const SampleNegatives& args, const Source* sources, std::int64_t n_sources,
                      Stream stream) {
  const std::int64_t vocab = args.logits.vocab;
  if (vocab > 0x7fffffff) throw std::invalid_argument("vocab: expected fewer than 2^31 tokens");
  for_dtype(args.logits.dtype, [&](auto type) {
    using T = decltype(type);
    const auto kernel = is_plain(args.logits) ? sum_tiles<T, true> : sum_tiles<T, false>;
    launch(kernel, dim3(static_cast<unsigned>(args.logits.n * segments_of(vocab))), dim3(kThreads), 0, stream,
           args);
    std::int64_t column = 0;
    for (std::int64_t s = 0; s < n_sources; ++s) {
      if (sources[s].count == 0) continue;
      launch(draw_tokens<T>, dim3(static_cast<unsigned>(args.logits.n)), dim3(kThreads),
             Scratch::bytes(tiles_of(vocab), sources[s].count + kSpareDraws), stream, args, sources[s],
             static_cast<std::uint32_t>(s), column);
      column += sources[s].count;
    }
  });
}

}  // namespace pyqe::cuda
