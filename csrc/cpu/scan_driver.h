// How the operations on statistics run a scan: rows in groups, work spread over threads, candidates kept.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "core/dominant.h"
#include "cpu/scan.h"

namespace pyqe::cpu {

// What the lists of candidates must hold in the end: the `count` largest tokens; among them those that are
// not the `exact` largest may be left out where their probability is below epsilon.
struct Selection {
  std::int64_t count = 0, exact = 0;
  double epsilon = 0;
};

class CandidateKeeper {
 public:
  CandidateKeeper(const Selection& selection, int threads) : selection_(selection), threads_(threads) {}

  // Empty lists for a group of rows.
  Candidates* reset(std::int64_t rows);

  // The candidates of a row of the group, largest first and lower ids first among equals, in `into`. Returns
  // a bound on what is not among them.
  float collect(std::int64_t row, std::vector<Candidate>& into) const;

  void make_room(Candidates& list);

 private:
  Selection selection_;
  int threads_;
  std::int64_t rows_ = 0;
  std::vector<Candidates> lists_;
  std::vector<std::vector<Candidate>> storage_;
};

// Runs the scan over all rows; finish(scan, row) is called, on some thread, for every row of a group after
// the group has been scanned. `keeper` may be null.
void run_scan(Scan scan, CandidateKeeper* keeper, int threads,
              const std::function<void(const Scan& scan, std::int64_t row)>& finish);

// The partial results of a row of the group, merged.
SoftmaxPartial merged_softmax(const Scan& scan, std::int64_t row);
SigmoidPartial merged_sigmoid(const Scan& scan, std::int64_t row);

// Hidden states in the form in which the scan multiplies them.
std::vector<float> packed_rows(const Logits& from, std::int64_t first_row, std::int64_t rows, int threads);

std::int64_t element_bytes(DType dtype);
void check_logits(const Logits& logits, int threads);
void check_token_ids(const std::int64_t* token_ids, std::int64_t n, std::int64_t k, std::int64_t vocab,
                     const char* name = "token_ids");

}  // namespace pyqe::cpu
