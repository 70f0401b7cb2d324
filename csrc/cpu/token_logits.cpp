#include "core/error.h"
#include "cpu/dispatch.h"
#include "cpu/operations.h"
#include "cpu/parallel.h"
#include "cpu/scan_driver.h"

namespace pyqe::cpu {
void token_logits_forward(const TokenLogitsForward& args, int threads) {
  require_at_least("n", args.n, 0);
  require_at_least("k", args.k, 0);
  require_at_least("dim", args.dim, 0);
  require_at_least("vocab", args.vocab, 0);
  require_at_least("threads", threads, 1);
  const std::int64_t pairs = args.n * args.k;
  const std::int64_t bytes = pairs * args.dim * element_bytes(args.dtype);
  check_token_ids(args.token_ids, args.n, args.k, args.vocab, "token_ids");
  const auto compute = kernels().token_logits_forward;
  parallel_for(pairs, bytes, threads,
               [&](std::int64_t begin, std::int64_t end) { compute(args, begin, end); });
}

void token_logits_backward_hidden(const TokenLogitsBackwardHidden& args, int threads) {
  require_at_least("n", args.n, 0);
  require_at_least("k", args.k, 0);
  require_at_least("dim", args.dim, 0);
  require_at_least("vocab", args.vocab, 0);
  require_at_least("threads", threads, 1);
  const std::int64_t bytes = args.n * (args.k + 1) * args.dim * element_bytes(args.dtype);
  check_token_ids(args.token_ids, args.n, args.k, args.vocab, "token_ids");
  const auto compute = kernels().token_logits_backward_hidden;
  parallel_for(args.n, bytes, threads,
               [&](std::int64_t begin, std::int64_t end) { compute(args, begin, end); });
}

void token_logits_backward_weight(const TokenLogitsBackwardWeight& args, int threads) {
  require_at_least("rows", args.rows, 0);
  require_at_least("k", args.k, 0);
  require_at_least("dim", args.dim, 0);
  require_at_least("threads", threads, 1);
  const std::int64_t pairs = args.rows ? args.row_starts[args.rows] - args.row_starts[0] : 0;
  const std::int64_t bytes = (pairs + args.rows) * args.dim * element_bytes(args.dtype);
  const auto compute = kernels().token_logits_backward_weight;
  parallel_for(args.rows, bytes, threads,
               [&](std::int64_t begin, std::int64_t end) { compute(args, begin, end); });
}

}  // namespace pyqe::cpu
