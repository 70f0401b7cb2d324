#include "cpu/scan_driver.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "core/error.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"

namespace pyqe::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

bool before(const Candidate& a, const Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

std::int64_t segments_of(std::int64_t vocab) { return (vocab + kSegment - 1) / kSegment; }

void make_room(const Scan& scan, Candidates& list) {
  static_cast<CandidateKeeper*>(scan.keeper)->make_room(list);
}

void raise_floor(const Scan& scan, Candidates& list, float max, double sum) {
  static_cast<const CandidateKeeper*>(scan.keeper)->raise_floor(list, max, sum);
}

void scan_group(const Scan& scan, int threads) {
  const Logits& from = scan.logits;
  const auto compute = kernels().scan;
  const std::int64_t bytes = element_bytes(from.dtype);
  if (!from.logits.data) {
    parallel_each(
        scan.segments, from.vocab * from.dim * bytes, threads,
        [&](std::int64_t segment, int thread) { compute(scan, 0, scan.rows, segment, segment + 1, thread); });
    return;
  }
  // Few rows are cut up to keep all threads at work.
  const bool cut = scan.rows < 4 * threads;
  const std::int64_t pieces = cut ? scan.segments : 1;
  parallel_each(scan.rows * pieces, scan.rows * from.vocab * bytes, threads,
                [&](std::int64_t item, int thread) {
                  const std::int64_t row = item / pieces, begin = item % pieces;
                  compute(scan, row, row + 1, begin, cut ? begin + 1 : scan.segments, thread);
                });
}

void attach(Scan& scan, CandidateKeeper* keeper) {
  scan.keeper = keeper;
  scan.make_room = make_room;
  scan.raise_floor = raise_floor;
}

}  // namespace

Selection selection_for(const DominantRule& rule, std::int64_t members, std::int64_t top_k) {
  // A rule without a bound on its members is decided on this many; rows with more take a second look.
  constexpr std::int64_t kUnboundedMembers = 256;
  switch (rule.kind) {
    case DominantKind::kNone:
      break;
    case DominantKind::kJump:
    case DominantKind::kEpsilon:
      return {std::max(top_k, members + 1), top_k > 0 ? 0 : rule.epsilon};
    case DominantKind::kTopK:
      return {std::max(top_k, members), 0};
    case DominantKind::kTopP:
    case DominantKind::kMinP:
    case DominantKind::kEta:
      return {std::max(top_k, std::min(members, kUnboundedMembers)), 0};
  }
  return {top_k, 0};
}

Candidates* CandidateKeeper::reset(std::int64_t rows) {
  rows_ = rows;
  lists_.assign(static_cast<std::size_t>(threads_ * rows),
                {nullptr, 0, 0, -kInfinity, -kInfinity, -kInfinity, 0});
  storage_.resize(lists_.size());
  for (std::size_t i = 0; i < lists_.size(); ++i) {
    lists_[i].items = storage_[i].data();
    lists_[i].capacity = static_cast<std::int64_t>(storage_[i].size());
  }
  return lists_.data();
}

void CandidateKeeper::raise_floor(Candidates& list, float max, double sum) const {
  if (selection_.epsilon == 0 || !std::isfinite(max)) return;
  const double slack = 1e-3 + 1e-6 * std::fabs(max);  // far more than rounding
  list.floor = std::max(list.floor, static_cast<float>(max + std::log(selection_.epsilon * sum) - slack));
}

void CandidateKeeper::make_room(Candidates& list) {
  Candidate* const end = list.items + list.size;
  Candidate* keep =
      std::partition(list.items, end, [&](const Candidate& c) { return c.logit >= list.floor; });
  if (keep - list.items > selection_.count) {
    keep = list.items + selection_.count;
    std::nth_element(list.items, keep - 1, end, before);
    list.floor = keep[-1].logit;
  }
  for (const Candidate* c = keep; c != end; ++c) list.dropped = std::max(list.dropped, c->logit);
  list.size = keep - list.items;
  if (list.size < list.capacity - list.capacity / 4) return;
  std::vector<Candidate>& storage = storage_[static_cast<std::size_t>(&list - lists_.data())];
  storage.resize(std::max<std::size_t>(32, 2 * storage.size()));
  list.items = storage.data();
  list.capacity = static_cast<std::int64_t>(storage.size());
}

float CandidateKeeper::collect(std::int64_t row, const SoftmaxPartial* total,
                               std::vector<Candidate>& into) const {
  into.clear();
  float dropped = -kInfinity;
  for (int thread = 0; thread < threads_; ++thread) {
    Candidates list = lists_[static_cast<std::size_t>(thread * rows_ + row)];
    if (total) raise_floor(list, total->max, total->sum);
    dropped = std::max(dropped, list.dropped);
    for (std::int64_t i = 0; i < list.size; ++i) {
      if (list.items[i].logit >= list.floor)
        into.push_back(list.items[i]);
      else
        dropped = std::max(dropped, list.items[i].logit);
    }
  }
  std::sort(into.begin(), into.end(), before);
  if (into.size() > static_cast<std::size_t>(selection_.count)) {
    dropped = std::max(dropped, into[static_cast<std::size_t>(selection_.count)].logit);
    into.resize(static_cast<std::size_t>(selection_.count));
  }
  // One thread may have dropped what is larger than some that another kept.
  while (!into.empty() && into.back().logit < dropped) into.pop_back();
  return dropped;
}

std::int64_t dominant_size(const DominantRule& rule, std::int64_t members, std::int64_t vocab,
                           const std::vector<Candidate>& found, float dropped, const SoftmaxPartial& total,
                           double entropy) {
  std::vector<double> probs;
  for (const Candidate& candidate : found) probs.push_back(probability(candidate.logit, total));
  const std::int64_t count = static_cast<std::int64_t>(probs.size());
  const double next = count == vocab ? std::nan("") : probability(dropped, total);
  return std::min(pyqe::dominant_size(rule, probs.data(), count, next, entropy, vocab), members);
}

std::vector<float> packed_rows(const Logits& from, std::int64_t first_row, std::int64_t rows, int threads) {
  const PanelShape shape = kernels().panel_shape(from.dtype, from.dim);
  const std::int64_t panels = (rows + shape.rows - 1) / shape.rows, size = shape.rows * shape.depth;
  std::vector<float> packed(static_cast<std::size_t>(panels * size) + 16);
  parallel_for(panels, panels * size * 4, threads, [&](std::int64_t begin, std::int64_t end) {
    kernels().pack_rows(from, first_row, rows, begin, end, packed.data());
  });
  return packed;
}

// How many rows are scanned before their results are merged: partial results take 1 % of what their logits
// would.
std::int64_t group_rows(const Logits& logits) { return logits.logits.data ? 64 : 1024; }

// The partial results of a group, and what else a scan needs beside its rows.
class GroupMemory {
 public:
  GroupMemory(ScanPart& part, std::int64_t rows) : part_(part) {
    Scan& scan = part.scan;
    scan.segments = segments_of(scan.logits.vocab);
    softmax_.resize(static_cast<std::size_t>(scan.softmax ? rows * scan.segments : 0));
    sigmoid_.resize(static_cast<std::size_t>(scan.sigmoid ? rows * scan.segments : 0));
    moments_.resize(static_cast<std::size_t>(scan.moments ? rows * scan.segments : 0));
    scan.softmax_partials = softmax_.data();
    scan.moments_partials = moments_.data();
    scan.sigmoid_partials = sigmoid_.data();
    attach(scan, part.keeper);
  }

  void start(std::int64_t first_row, std::int64_t rows) {
    part_.scan.first_row = first_row, part_.scan.rows = rows;
    if (part_.keeper) part_.scan.lists = part_.keeper->reset(rows);
  }

 private:
  ScanPart& part_;
  std::vector<SoftmaxPartial> softmax_;
  std::vector<SigmoidPartial> sigmoid_;
  std::vector<MomentsPartial> moments_;
};

void run_scan(ScanPart part, int threads, const std::function<void(const Scan&)>& finish, ScanPart* second) {
  Scan& scan = part.scan;
  const Logits& from = scan.logits;
  const std::int64_t step = group_rows(from), largest = std::min(step, from.n);
  GroupMemory memory(part, largest);
  std::optional<GroupMemory> second_memory;
  if (second) {
    second->scan.logits = from;
    second_memory.emplace(*second, largest);
    scan.second = &second->scan;
  }
  for (std::int64_t first_row = 0; first_row < from.n; first_row += step) {
    const std::int64_t rows = std::min(step, from.n - first_row);
    memory.start(first_row, rows);
    if (second) second_memory->start(first_row, rows);
    std::vector<float> packed;
    if (!from.logits.data) packed = packed_rows(from, first_row, rows, threads);
    scan.packed_rows = packed.data();
    scan_group(scan, threads);
    finish(scan);
  }
}

void run_scan_by_row(const Scan& scan, const Selection* selection, int threads,
                     const std::function<void(const Scan&, const CandidateKeeper*)>& finish) {
  const Logits& from = scan.logits;
  const std::int64_t segments = segments_of(from.vocab);
  std::vector<SoftmaxPartial> softmax(static_cast<std::size_t>(scan.softmax ? threads * segments : 0));
  std::vector<SigmoidPartial> sigmoid(static_cast<std::size_t>(scan.sigmoid ? threads * segments : 0));
  std::vector<CandidateKeeper> keepers(static_cast<std::size_t>(threads),
                                       CandidateKeeper(selection ? *selection : Selection{0, 0}, 1));
  const std::int64_t bytes = from.n * from.vocab * element_bytes(from.dtype);
  parallel_each(from.n, bytes, threads, [&](std::int64_t row, int thread) {
    CandidateKeeper* keeper = selection ? &keepers[static_cast<std::size_t>(thread)] : nullptr;
    Scan mine = scan;
    attach(mine, keeper);
    mine.first_row = row, mine.rows = 1, mine.segments = segments;
    mine.softmax_partials = softmax.data() + thread * segments;
    mine.sigmoid_partials = sigmoid.data() + thread * segments;
    if (keeper) mine.lists = keeper->reset(1);
    kernels().scan(mine, 0, 1, 0, segments, 0);
    finish(mine, keeper);
  });
}

std::int64_t element_bytes(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return 4;
    case DType::kBFloat16:
    case DType::kFloat16:
      return 2;
    case DType::kFloat64:
      break;
  }
  throw std::invalid_argument("dtype: expected fp32 (0), bf16 (1) or fp16 (2), got " +
                              std::to_string(static_cast<int>(dtype)));
}

void check_logits(const Logits& logits, int threads) {
  require_at_least("n", logits.n, 0);
  require_at_least("dim", logits.dim, 0);
  require_at_least("vocab", logits.vocab, 1);
  if (logits.vocab > std::numeric_limits<std::int32_t>::max()) {  // ids of candidates are of 32 bits
    throw std::invalid_argument("vocab: expected less than 2^31, got " + std::to_string(logits.vocab));
  }
  require_at_least("threads", threads, 1);
  element_bytes(logits.dtype);
}

void check_token_ids(const std::int64_t* token_ids, std::int64_t n, std::int64_t k, std::int64_t vocab,
                     const char* name) {
  for (std::int64_t pair = 0; pair < n * k; ++pair) {
    // Unsigned, so that one comparison covers both ends: -1 becomes 0, ids below it become huge.
    if (static_cast<std::uint64_t>(token_ids[pair]) + 1 > static_cast<std::uint64_t>(vocab)) {
      throw TokenIdError(name, pair / k, pair % k, token_ids[pair], vocab);
    }
  }
}

}  // namespace pyqe::cpu
