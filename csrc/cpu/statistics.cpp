// Softmax and sigmoid statistics of all rows, from a scan.
#include "cpu/statistics.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/scan_driver.h"

namespace pyqe::cpu {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

Scan scan_of(const Logits& logits, const std::int64_t* token_ids, std::int64_t n_tokens,
             float* token_logits) {
  check_token_ids(token_ids, logits.n, n_tokens, logits.vocab, "token_ids");
  std::fill_n(token_logits, logits.n * n_tokens, kNan);
  Scan scan = {};
  scan.logits = logits;
  scan.token_ids = token_ids;
  scan.n_tokens = n_tokens;
  scan.token_logits = token_logits;
  scan.threshold = kNan;
  return scan;
}

// The k largest; tokens of logit -infinity are not candidates, so the first of them fill up what is missing.
void write_top_k(std::vector<Candidate>& found, bool valid, std::int64_t k, float* logits,
                 std::int64_t* ids) {
  if (!valid) {
    std::fill_n(logits, k, kNan);
    std::fill_n(ids, k, -1);
    return;
  }
  const std::int64_t known = std::min<std::int64_t>(k, static_cast<std::int64_t>(found.size()));
  for (std::int64_t i = 0; i < known; ++i)
    logits[i] = found[static_cast<std::size_t>(i)].logit, ids[i] = found[static_cast<std::size_t>(i)].id;
  std::int64_t id = 0;
  for (std::int64_t i = known; i < k; ++id) {
    if (std::find(ids, ids + known, id) == ids + known) logits[i] = -kInfinity, ids[i++] = id;
  }
}

void write_dominant(const SoftmaxStats& args, const std::vector<Candidate>& found, float dropped, bool valid,
                    const SoftmaxPartial& total, double entropy, std::int64_t row) {
  std::int64_t* ids = args.dominant_ids + row * args.members;
  std::fill_n(ids, args.members, -1);
  args.size[row] = 0;
  args.mass[row] = kNan;
  if (!valid) return;
  const std::int64_t size =
      dominant_size(args.rule, args.members, args.logits.vocab, found, dropped, total, entropy);
  args.size[row] = size;
  double mass = 0;
  for (std::int64_t i = 0; i < size; ++i) {
    ids[i] = found[static_cast<std::size_t>(i)].id;
    mass += probability(found[static_cast<std::size_t>(i)].logit, total);
  }
  args.mass[row] = static_cast<float>(mass);
}

void finish_softmax(const SoftmaxStats& args, const Scan& scan, const CandidateKeeper* keeper,
                    std::int64_t in_group) {
  const std::int64_t row = scan.first_row + in_group;
  const SoftmaxPartial total = merged_softmax(scan, in_group);
  const bool valid = is_distribution(total);
  const double log_sum = std::log(total.sum);
  const double entropy = entropy_of(total);
  args.max_logit[row] = valid ? total.max : kNan;
  args.max_logprob[row] = valid ? static_cast<float>(-log_sum) : kNan;
  args.argmax[row] = valid ? total.argmax : -1;
  if (args.entropy) args.entropy[row] = valid ? static_cast<float>(entropy) : kNan;
  if (args.tempered) {
    const double beta = scan.inverse_temperature;
    args.tempered[row] = valid ? static_cast<float>(beta * total.max + std::log(total.tempered)) : kNan;
  }
  if (!valid) std::fill_n(args.token_logits + row * args.n_tokens, args.n_tokens, kNan);
  if (!keeper) return;
  std::vector<Candidate> found;
  const float dropped = keeper->collect(in_group, &total, found);
  write_top_k(found, valid, args.top_k, args.topk_logits + row * args.top_k,
              args.topk_ids + row * args.top_k);
  if (args.rule.kind != DominantKind::kNone) {
    write_dominant(args, found, dropped, valid, total, entropy, row);
  }
}

void finish_sigmoid(const SigmoidStats& args, const Scan& scan, const CandidateKeeper* keeper,
                    std::int64_t in_group) {
  const std::int64_t row = scan.first_row + in_group;
  const SigmoidPartial total = merged_sigmoid(scan, in_group);
  const bool valid = !std::isnan(total.sum);
  args.max_logit[row] = valid ? total.max : kNan;
  args.argmax[row] = valid ? total.argmax : -1;
  args.sum_prob[row] = static_cast<float>(total.sum);
  if (args.count_above) args.count_above[row] = valid ? total.above : -1;
  if (!valid) std::fill_n(args.token_logits + row * args.n_tokens, args.n_tokens, kNan);
  if (!keeper) return;
  std::vector<Candidate> found;
  keeper->collect(in_group, nullptr, found);
  write_top_k(found, valid, args.top_k, args.topk_logits + row * args.top_k,
              args.topk_ids + row * args.top_k);
}

// finish(scan, keeper, row) for every row of every group.
template <class Finish>
void run_rows(const Scan& scan, const Selection& selection, int threads, const Finish& finish) {
  const bool candidates = selection.count > 0;
  if (scan.logits.logits.data && scan.logits.n >= 4 * threads) {
    run_scan_by_row(scan, candidates ? &selection : nullptr, threads,
                    [&](const Scan& group, const CandidateKeeper* keeper) { finish(group, keeper, 0); });
    return;
  }
  CandidateKeeper keeper(selection, threads);
  CandidateKeeper* wanted = candidates ? &keeper : nullptr;
  run_scan({scan, wanted}, threads, [&](const Scan& group) {
    for_each_row(group, threads, [&](std::int64_t row) { finish(group, wanted, row); });
  });
}

Scan softmax_scan(const SoftmaxStats& args, int threads) {
  check_logits(args.logits, threads);
  Scan scan = scan_of(args.logits, args.token_ids, args.n_tokens, args.token_logits);
  scan.softmax = true;
  scan.entropy = args.entropy != nullptr || args.rule.kind == DominantKind::kEta;
  scan.inverse_temperature = args.tempered ? static_cast<float>(1 / args.temperature) : 0;
  return scan;
}

Scan sigmoid_scan(const SigmoidStats& args, int threads) {
  check_logits(args.logits, threads);
  Scan scan = scan_of(args.logits, args.token_ids, args.n_tokens, args.token_logits);
  scan.sigmoid = true;
  if (args.count_above) scan.threshold = args.threshold;
  return scan;
}

}  // namespace

void softmax_stats(const SoftmaxStats& args, int threads) {
  run_rows(softmax_scan(args, threads), selection_for(args.rule, args.members, args.top_k), threads,
           [&](const Scan& group, const CandidateKeeper* keeper, std::int64_t row) {
             finish_softmax(args, group, keeper, row);
           });
}

void sigmoid_stats(const SigmoidStats& args, int threads) {
  run_rows(sigmoid_scan(args, threads), {args.top_k, 0}, threads,
           [&](const Scan& group, const CandidateKeeper* keeper, std::int64_t row) {
             finish_sigmoid(args, group, keeper, row);
           });
}

void joint_stats(const SoftmaxStats& softmax, const SigmoidStats& sigmoid, const Correction& correction,
                 int threads) {
  const Selection selection = selection_for(softmax.rule, softmax.members, softmax.top_k);
  CandidateKeeper softmax_keeper(selection, threads), sigmoid_keeper({sigmoid.top_k, 0}, threads);
  ScanPart first = {softmax_scan(softmax, threads), selection.count > 0 ? &softmax_keeper : nullptr};
  ScanPart second = {sigmoid_scan(sigmoid, threads), sigmoid.top_k > 0 ? &sigmoid_keeper : nullptr};
  first.scan.correction = correction;
  const auto finish = [&](const Scan& group) {
    for_each_row(group, threads, [&](std::int64_t row) {
      finish_softmax(softmax, group, first.keeper, row);
      finish_sigmoid(sigmoid, *group.second, second.keeper, row);
    });
  };
  run_scan(first, threads, finish, &second);
}

void copy_logits(const Logits& logits, float* to, int threads) {
  check_logits(logits, threads);
  Scan scan = {};
  scan.logits = logits;
  scan.copy = to;
  run_scan({scan, nullptr}, threads, [](const Scan&) {});
}

}  // namespace pyqe::cpu
