// A token is drawn by inversion in two stages: a tile of kTile tokens by the sums that the scan leaves, then
// a token of that tile, whose logits are computed again, for all rows together that have drawn the same tile.
// So there is no random number per logit, and no logit is kept.
//
// Drawing with replacement and passing over what was drawn before is drawing without replacement. A row that
// has not got enough after a round goes on with weight zero for what it holds, which is the same distribution
// again.
//
// The numbers and what they stand for are those of the reference backend: both draw the same tokens but for
// rounding.
#include "cpu/sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "core/philox.h"
#include "cpu/dispatch.h"
#include "cpu/scan_driver.h"

namespace pyqe::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

using Ids = std::vector<std::int64_t>;

template <class T>
T& at(std::vector<T>& items, std::int64_t i) {
  return items[static_cast<std::size_t>(i)];
}

template <class T>
const T& at(const std::vector<T>& items, std::int64_t i) {
  return items[static_cast<std::size_t>(i)];
}

// One draw of a row: which tile, and how far into it.
struct Draw {
  std::int64_t tile = 0, row = 0, slot = -1;
  double value = 0;
};

struct ChangedTile {
  std::int64_t row, tile;
  TileSum sum;
};

struct Row {
  bool open = false;                 // still to be drawn for
  Ids excluded;                      // ascending: the target, the dominant tokens, what the source has drawn
  std::vector<ChangedTile> changed;  // by what the source has drawn
  float best = 0;                    // largest logit that may be drawn
  double softmax = 0, unigram = 0, uniform = 0;  // weights of the parts, divided by their sums
  std::int64_t filled = 0;
};

class Sampler {
 public:
  Sampler(const SampleNegatives& args, int threads)
      : args_(args), threads_(threads), tiles_((args.logits.vocab + kTile - 1) / kTile) {
    for (std::int64_t s = 0; s < args.n_sources; ++s) width_ += args.sources[s].count;
    cumulative_.assign(static_cast<std::size_t>(args.counts ? args.logits.vocab + 1 : 0), 0.0);
    for (std::int64_t v = 0; args.counts && v < args.logits.vocab; ++v) {
      at(cumulative_, v + 1) = at(cumulative_, v) + args.counts[v];
    }
  }

  bool wants_softmax() const {
    return std::any_of(args_.sources, args_.sources + args_.n_sources,
                       [](const Source& s) { return s.softmax > 0; });
  }

  void run(const Scan& scan, const CandidateKeeper* keeper) {
    scan_ = &scan;
    rows_.assign(static_cast<std::size_t>(scan.rows), Row());
    for_each_row(scan, threads_, [&](std::int64_t row) { exclude(row, keeper); });
    if (scan.tile_sums) {
      for (const ChangedTile& tile : sums_without_excluded()) sum_of(tile.row, tile.tile) = tile.sum;
    }
    const std::vector<Row> fresh = rows_;
    std::int64_t column = 0;
    for (std::int64_t s = 0; s < args_.n_sources; ++s) {
      if (s > 0) rows_ = fresh;
      draw_source(args_.sources[s], static_cast<std::uint32_t>(s), column);
      column += args_.sources[s].count;
    }
    for_each_row(scan, threads_, [&](std::int64_t row) { drop_repeats(out(row)); });
  }

 private:
  std::int64_t* out(std::int64_t row) const { return args_.ids + (scan_->first_row + row) * width_; }
  TileSum& sum_of(std::int64_t row, std::int64_t tile) const { return scan_->tile_sums[row * tiles_ + tile]; }
  std::int64_t tile_size(std::int64_t tile) const {
    return std::min(kTile, args_.logits.vocab - tile * kTile);
  }

  // What is never drawn for the row.
  void exclude(std::int64_t in_group, const CandidateKeeper* keeper) {
    const std::int64_t n = scan_->first_row + in_group;
    std::fill_n(out(in_group), width_, -1);
    args_.undecided[n] = 0;
    const SoftmaxPartial total = merged_softmax(*scan_, in_group);
    if (!is_distribution(total)) return;
    Row& row = at(rows_, in_group);
    if (keeper) {
      std::vector<Candidate> found;
      const float dropped = keeper->collect(in_group, &total, found);
      const std::int64_t size = dominant_size(args_.exclude, args_.members, args_.logits.vocab, found,
                                              dropped, total, entropy_of(total));
      args_.undecided[n] = size < 0;
      if (size < 0) return;
      for (std::int64_t i = 0; i < size; ++i) row.excluded.push_back(at(found, i).id);
    }
    row.open = true;
    if (args_.targets[n] >= 0) add_excluded(row, args_.targets[n]);
    std::sort(row.excluded.begin(), row.excluded.end());
  }

  static void add_excluded(Row& row, std::int64_t id) {
    if (std::find(row.excluded.begin(), row.excluded.end(), id) == row.excluded.end())
      row.excluded.push_back(id);
  }

  void drop_repeats(std::int64_t* ids) const {
    for (std::int64_t k = 1; k < width_; ++k) {
      if (std::find(ids, ids + k, ids[k]) != ids + k) ids[k] = -1;
    }
  }

  // --- logits of single tiles ---

  // body(draw, logits) for every draw, whose tile's logits are computed for all rows together.
  template <class Body>
  void with_tiles(std::vector<Draw>& draws, const Body& body) const {
    std::sort(draws.begin(), draws.end(), [](const Draw& a, const Draw& b) {
      return a.tile != b.tile ? a.tile < b.tile : a.row != b.row ? a.row < b.row : a.slot < b.slot;
    });
    Ids starts;
    for (std::size_t i = 0; i < draws.size(); ++i) {
      if (i == 0 || draws[i].tile != draws[i - 1].tile) starts.push_back(static_cast<std::int64_t>(i));
    }
    const std::int64_t groups = static_cast<std::int64_t>(starts.size());
    starts.push_back(static_cast<std::int64_t>(draws.size()));
    const std::int64_t bytes = groups * kTile * std::max<std::int64_t>(args_.logits.dim, 1) * 2;
    parallel_each(groups, bytes, threads_, [&](std::int64_t group, int) {
      with_tile(draws.data() + at(starts, group), draws.data() + at(starts, group + 1), body);
    });
  }

  template <class Body>
  void with_tile(const Draw* begin, const Draw* end, const Body& body) const {
    constexpr std::int64_t kRowsAtOnce = 128;  // keeps the buffer in the cache
    const std::int64_t first_id = begin->tile * kTile, count = tile_size(begin->tile);
    std::vector<float> logits(static_cast<std::size_t>(kRowsAtOnce * kTile));
    Ids rows;
    while (begin != end) {
      rows.clear();
      const Draw* next = begin;
      for (; next != end; ++next) {
        const std::int64_t n = scan_->first_row + next->row;
        if (!rows.empty() && rows.back() == n) continue;
        if (static_cast<std::int64_t>(rows.size()) == kRowsAtOnce) break;
        rows.push_back(n);
      }
      kernels().tile_logits(args_.logits, first_id, count, rows.data(),
                            static_cast<std::int64_t>(rows.size()), logits.data());
      const float* z = logits.data();
      for (const Draw* draw = begin; draw != next; ++draw) {
        if (draw != begin && draw->row != (draw - 1)->row) z += kTile;
        body(*draw, z);
      }
      begin = next;
    }
  }

  // The logits of a tile with -infinity for what is not to be drawn.
  void masked(const Row& row, std::int64_t tile, const float* logits, float* z) const {
    std::copy_n(logits, tile_size(tile), z);
    const auto first = std::lower_bound(row.excluded.begin(), row.excluded.end(), tile * kTile);
    for (auto id = first; id != row.excluded.end() && *id < (tile + 1) * kTile; ++id)
      z[*id - tile * kTile] = -kInfinity;
  }

  // e^((z - base) beta) factor
  void softmax_weights(std::int64_t tile, float base, float* z) const {
    kernels().scaled_exp(z, tile_size(tile), base, args_.beta);
    for (std::int64_t i = 0; args_.factor && i < tile_size(tile); ++i) z[i] *= args_.factor[tile * kTile + i];
  }

  // The sums of the tiles that hold excluded tokens, without these.
  std::vector<ChangedTile> sums_without_excluded() const {
    std::vector<Draw> draws;
    std::vector<ChangedTile> changed;
    for (std::int64_t r = 0; r < scan_->rows; ++r) {
      const Row& row = at(rows_, r);
      std::int64_t last = -1;
      for (const std::int64_t id : row.excluded) {
        if (!row.open || id / kTile == last) continue;
        last = id / kTile;
        draws.push_back({last, r, static_cast<std::int64_t>(changed.size()), 0});
        changed.push_back({r, last, {-kInfinity, 0}});
      }
    }
    with_tiles(draws, [&](const Draw& draw, const float* logits) {
      float z[kTile];
      masked(at(rows_, draw.row), draw.tile, logits, z);
      const std::int64_t count = tile_size(draw.tile);
      TileSum& sum = at(changed, draw.slot).sum;
      sum.max = *std::max_element(z, z + count);
      if (sum.max == -kInfinity) return;
      softmax_weights(draw.tile, sum.max, z);
      sum.sum = static_cast<float>(std::accumulate(z, z + count, 0.0));
    });
    return changed;
  }

  // --- weights ---

  // Sum of the unigram and uniform parts of the tokens [begin, end) that may be drawn.
  double flat_mass(const Row& row, std::int64_t begin, std::int64_t end) const {
    double tokens = static_cast<double>(end - begin);
    double counts = row.unigram > 0 ? at(cumulative_, end) - at(cumulative_, begin) : 0;
    auto id = std::lower_bound(row.excluded.begin(), row.excluded.end(), begin);
    for (; id != row.excluded.end() && *id < end; ++id) {
      tokens -= 1;
      if (row.unigram > 0) counts -= args_.counts[*id];
    }
    return row.uniform * tokens + row.unigram * std::max(counts, 0.0);
  }

  double flat_weight(const Row& row, std::int64_t id) const {
    return row.uniform + (row.unigram > 0 ? row.unigram * args_.counts[id] : 0.0);
  }

  TileSum softmax_sum(std::int64_t r, std::int64_t tile) const {
    for (const ChangedTile& changed : at(rows_, r).changed) {
      if (changed.tile == tile) return changed.sum;
    }
    return sum_of(r, tile);
  }

  // e^((max - best) beta): what the weights of a tile, which are relative to its own maximum, are times.
  double tile_factor(const Row& row, const TileSum& tile) const {
    return tile.max == -kInfinity ? 0 : std::exp((static_cast<double>(tile.max) - row.best) * args_.beta);
  }

  double softmax_mass(std::int64_t r, std::int64_t tile) const {
    const TileSum sum = softmax_sum(r, tile);
    return sum.sum * tile_factor(at(rows_, r), sum);
  }

  // Divides the weights of the parts by their sums.
  void normalise(std::int64_t r, Row& row, const Source& source) const {
    row.softmax = row.unigram = row.uniform = 0;
    const std::int64_t vocab = args_.logits.vocab;
    const auto share = [](double weight, double sum) { return weight > 0 && sum > 0 ? weight / sum : 0.0; };
    if (source.softmax > 0) {
      row.best = -kInfinity;
      for (std::int64_t tile = 0; tile < tiles_; ++tile) row.best = std::max(row.best, sum_of(r, tile).max);
      double sum = 0;
      for (std::int64_t tile = 0; tile < tiles_; ++tile) sum += softmax_mass(r, tile);
      row.softmax = share(source.softmax, sum);
    }
    Row part = {};
    part.excluded = row.excluded;
    part.uniform = 1;
    const double uniform = share(source.uniform, source.uniform > 0 ? flat_mass(part, 0, vocab) : 0.0);
    part.uniform = 0, part.unigram = 1;
    row.unigram = share(source.unigram, source.unigram > 0 ? flat_mass(part, 0, vocab) : 0.0);
    row.uniform = uniform;
  }

  // The token at `value` of the cumulative flat weights of what may be drawn; -1 where rounding leads to one
  // without weight.
  std::int64_t find_flat(const Row& row, double value) const {
    const auto before = [&](std::int64_t id) {
      const double mass = row.uniform * static_cast<double>(id);
      return row.unigram > 0 ? mass + row.unigram * at(cumulative_, id) : mass;
    };
    for (const std::int64_t id : row.excluded) {
      if (value < before(id)) break;
      value += flat_weight(row, id);
    }
    std::int64_t low = 0, high = args_.logits.vocab - 1;  // the first id with before(id + 1) > value
    while (low < high) {
      const std::int64_t middle = (low + high) / 2;
      before(middle + 1) > value ? high = middle : low = middle + 1;
    }
    return flat_weight(row, low) > 0 ? low : -1;
  }

  // The token at `value` of the cumulative weights of one tile; -1 where none has any.
  std::int64_t find_in_tile(const Draw& draw, const float* logits) const {
    const Row& row = at(rows_, draw.row);
    const TileSum sum = softmax_sum(draw.row, draw.tile);
    const double softmax = row.softmax * tile_factor(row, sum);
    const std::int64_t count = tile_size(draw.tile), first = draw.tile * kTile;
    float z[kTile];
    masked(row, draw.tile, logits, z);
    if (softmax > 0) softmax_weights(draw.tile, sum.max, z);
    auto excluded = std::lower_bound(row.excluded.begin(), row.excluded.end(), first);
    double cumulative[kTile], total = 0;
    for (std::int64_t i = 0; i < count; ++i) {
      const bool out = excluded != row.excluded.end() && *excluded == first + i;
      if (out) ++excluded;
      if (!out) total += flat_weight(row, first + i) + (softmax > 0 ? softmax * z[i] : 0.0);
      cumulative[i] = total;
    }
    if (total == 0) return -1;
    return first + (std::upper_bound(cumulative, cumulative + count, below(draw.value, total)) - cumulative);
  }

  // --- rounds ---

  void draw_source(const Source& source, std::uint32_t stream, std::int64_t column) {
    for_each_row(*scan_, threads_, [&](std::int64_t r) {
      if (at(rows_, r).open) normalise(r, at(rows_, r), source);
    });
    const std::int64_t per_round = source.count + kSpareDraws;
    for (std::int64_t round = 0; round < source.count && any_open(); ++round) {
      if (round > 0) exclude_drawn(source, column);
      const std::int64_t start = round * per_round;
      draw_some(source, stream, column, start, start + source.count);
      draw_some(source, stream, column, start + source.count, start + per_round);
    }
  }

  bool any_open() const {
    return std::any_of(rows_.begin(), rows_.end(), [](const Row& row) { return row.open; });
  }

  // What a row has drawn is not drawn again.
  void exclude_drawn(const Source& source, std::int64_t column) {
    for_each_row(*scan_, threads_, [&](std::int64_t r) {
      Row& row = at(rows_, r);
      row.changed.clear();
      for (std::int64_t k = 0; row.open && k < row.filled; ++k) add_excluded(row, out(r)[column + k]);
      std::sort(row.excluded.begin(), row.excluded.end());
    });
    if (source.softmax == 0) return;
    for (const ChangedTile& tile : sums_without_excluded()) at(rows_, tile.row).changed.push_back(tile);
  }

  // Draws [begin, end) of all open rows. A row without anything left to draw is closed.
  void draw_some(const Source& source, std::uint32_t stream, std::int64_t column, std::int64_t begin,
                 std::int64_t end) {
    const std::int64_t per_row = end - begin;
    std::vector<Draw> draws(static_cast<std::size_t>(scan_->rows * per_row));
    Ids ids(draws.size(), -1);
    for_each_row(*scan_, threads_, [&](std::int64_t r) {
      if (at(rows_, r).open)
        start_draws(r, source, stream, begin, per_row, &at(draws, r * per_row), &at(ids, r * per_row));
    });
    if (source.softmax > 0) {
      draws.erase(std::remove_if(draws.begin(), draws.end(), [](const Draw& d) { return d.slot < 0; }),
                  draws.end());
      with_tiles(draws, [&](const Draw& draw, const float* logits) {
        at(ids, draw.row * per_row + draw.slot) = find_in_tile(draw, logits);
      });
    }
    for_each_row(*scan_, threads_, [&](std::int64_t r) {
      if (at(rows_, r).open)
        accept(at(rows_, r), source.count, &at(ids, r * per_row), per_row, out(r) + column);
    });
  }

  // The tiles of a row's draws, or the tokens themselves where no logit is needed for them.
  void start_draws(std::int64_t r, const Source& source, std::uint32_t stream, std::int64_t begin,
                   std::int64_t count, Draw* draws, std::int64_t* ids) {
    Row& row = at(rows_, r);
    const auto number = [&](std::int64_t k) {
      return uniform(args_.seed, stream, static_cast<std::uint64_t>(scan_->first_row + r),
                     static_cast<std::uint32_t>(begin + k));
    };
    if (source.softmax == 0) {
      const double total = flat_mass(row, 0, args_.logits.vocab);
      row.open = total > 0;
      for (std::int64_t k = 0; row.open && k < count; ++k)
        ids[k] = find_flat(row, below(number(k) * total, total));
      return;
    }
    std::vector<double> cumulative;
    double total = 0;
    const bool flat = row.unigram > 0 || row.uniform > 0;
    for (std::int64_t tile = 0; tile < tiles_; ++tile) {
      total += row.softmax * softmax_mass(r, tile);
      if (flat) total += flat_mass(row, tile * kTile, tile * kTile + tile_size(tile));
      cumulative.push_back(total);
    }
    row.open = total > 0;
    for (std::int64_t k = 0; row.open && k < count; ++k) {
      const double value = below(number(k) * total, total);
      const std::int64_t tile =
          std::upper_bound(cumulative.begin(), cumulative.end(), value) - cumulative.begin();
      draws[k] = {tile, r, k, tile > 0 ? value - at(cumulative, tile - 1) : value};
    }
  }

  // Takes those of the ids drawn that the row does not have yet.
  static void accept(Row& row, std::int64_t wanted, const std::int64_t* drawn, std::int64_t count,
                     std::int64_t* ids) {
    for (std::int64_t k = 0; k < count && row.filled < wanted; ++k) {
      const bool allowed =
          drawn[k] >= 0 && !std::binary_search(row.excluded.begin(), row.excluded.end(), drawn[k]);
      if (allowed && std::find(ids, ids + row.filled, drawn[k]) == ids + row.filled)
        ids[row.filled++] = drawn[k];
    }
    row.open = row.filled < wanted;
  }

  const SampleNegatives& args_;
  int threads_;
  std::int64_t tiles_, width_ = 0;
  std::vector<double> cumulative_;  // of the counts
  const Scan* scan_ = nullptr;
  std::vector<Row> rows_;
};

}  // namespace

void sample_negatives(const SampleNegatives& args, int threads) {
  check_logits(args.logits, threads);
  check_token_ids(args.targets, args.logits.n, 1, args.logits.vocab, "targets");
  Sampler sampler(args, threads);
  Scan scan = {};
  scan.logits = args.logits;
  scan.softmax = true;
  scan.entropy = args.exclude.kind == DominantKind::kEta;
  scan.threshold = std::numeric_limits<float>::quiet_NaN();
  const std::int64_t tiles = (args.logits.vocab + kTile - 1) / kTile;
  std::vector<TileSum> tile_sums;
  if (sampler.wants_softmax()) {
    tile_sums.resize(static_cast<std::size_t>(std::min(group_rows(args.logits), args.logits.n) * tiles));
    scan.tile_sums = tile_sums.data();
    scan.tile_beta = args.beta;
    scan.factors = args.factor;
  }
  const Selection selection = selection_for(args.exclude, args.members, 0);
  CandidateKeeper keeper(selection, threads);
  CandidateKeeper* wanted = selection.count > 0 ? &keeper : nullptr;
  run_scan({scan, wanted}, threads, [&](const Scan& group) { sampler.run(group, wanted); });
}

}  // namespace pyqe::cpu
