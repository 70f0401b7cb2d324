// How the operations on statistics run a scan: rows in groups, work spread over threads, candidates kept.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "core/dominant.h"
#include "cpu/parallel.h"
#include "cpu/scan.h"

namespace pyqe::cpu {

// What the lists of candidates must hold in the end: the `count` largest tokens, but for those whose
// probability is at most epsilon.
struct Selection {
  std::int64_t count;
  double epsilon;
};

// For the `top_k` largest tokens, and for a rule with at most `members` dominant ones.
Selection selection_for(const DominantRule& rule, std::int64_t members, std::int64_t top_k);

class CandidateKeeper {
 public:
  CandidateKeeper(const Selection& selection, int threads) : selection_(selection), threads_(threads) {}

  // Empty lists for a group of rows.
  Candidates* reset(std::int64_t rows);

  // The candidates of a row of the group, largest first and lower ids first among equals, in `into`; `total`
  // is the row's softmax, or null. Returns a bound on what is not among them.
  float collect(std::int64_t row, const SoftmaxPartial* total, std::vector<Candidate>& into) const;

  void make_room(Candidates& list);

  // The sum of e^(z - max) over some tokens of the row bounds what can be more probable than epsilon.
  void raise_floor(Candidates& list, float max, double sum) const;

 private:
  Selection selection_;
  int threads_;
  std::int64_t rows_ = 0;
  std::vector<Candidates> lists_;
  std::vector<std::vector<Candidate>> storage_;
};

// A scan with the lists of its candidates, which may be null.
struct ScanPart {
  Scan scan;
  CandidateKeeper* keeper;
};

// Runs the scan over all rows, and the second one if there is one on its corrected logits; finish(scan) is
// called after every group (scan.second being the other).
void run_scan(ScanPart part, int threads, const std::function<void(const Scan&)>& finish,
              ScanPart* second = nullptr);

// The same for logits that exist, a row at a time, which reads memory in order; finish(scan, keeper) is
// called for every row, as a group of its own, by the thread that scanned it. `selection` may be null.
void run_scan_by_row(const Scan& scan, const Selection* selection, int threads,
                     const std::function<void(const Scan&, const CandidateKeeper*)>& finish);

// Calls body(row) for every row of a group, on several threads.
template <class Body>
void for_each_row(const Scan& scan, int threads, const Body& body) {
  constexpr std::int64_t kBytes = 64;  // of partial results
  parallel_for(scan.rows, scan.rows * scan.segments * kBytes, threads,
               [&](std::int64_t begin, std::int64_t end) {
                 for (std::int64_t row = begin; row < end; ++row) body(row);
               });
}

// How many rows a group has at most.
std::int64_t group_rows(const Logits& logits);

// The partial results of a row of the group, merged.
inline SoftmaxPartial merged_softmax(const Scan& scan, std::int64_t row) {
  return merged(scan.softmax_partials + row * scan.segments, scan.segments, scan.inverse_temperature);
}

inline SigmoidPartial merged_sigmoid(const Scan& scan, std::int64_t row) {
  return merged(scan.sigmoid_partials + row * scan.segments, scan.segments);
}

inline MomentsPartial merged_moments(const Scan& scan, std::int64_t row) {
  return merged(scan.moments_partials + row * scan.segments, scan.segments, scan.moments_beta);
}

// How many of the candidates found, largest first, are dominant; -1 where it takes more of them to tell.
std::int64_t dominant_size(const DominantRule& rule, std::int64_t members, std::int64_t vocab,
                           const std::vector<Candidate>& found, float dropped, const SoftmaxPartial& total,
                           double entropy);

// Hidden states in the form in which the scan multiplies them.
std::vector<float> packed_rows(const Logits& from, std::int64_t first_row, std::int64_t rows, int threads);

std::int64_t element_bytes(DType dtype);
void check_logits(const Logits& logits, int threads);
void check_token_ids(const std::int64_t* token_ids, std::int64_t n, std::int64_t k, std::int64_t vocab,
                     const char* name);

}  // namespace pyqe::cpu
