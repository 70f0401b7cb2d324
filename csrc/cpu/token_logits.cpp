#include "core/error.h"
#include "cpu/dispatch.h"
#include "cpu/operations.h"
#include "cpu/parallel.h"

namespace pyqe::cpu {
namespace {

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

void check_token_ids(const std::int64_t* token_ids, std::int64_t n, std::int64_t k, std::int64_t vocab) {
  for (std::int64_t pair = 0; pair < n * k; ++pair) {
    // Unsigned, so that one comparison covers both ends: -1 becomes 0, ids below it become huge.
    if (static_cast<std::uint64_t>(token_ids[pair]) + 1 > static_cast<std::uint64_t>(vocab)) {
      throw TokenIdError(pair / k, pair % k, token_ids[pair], vocab);
    }
  }
}

}  // namespace

void token_logits_forward(const TokenLogitsForward& args, int threads) {
  require_at_least("n", args.n, 0);
  require_at_least("k", args.k, 0);
  require_at_least("dim", args.dim, 0);
  require_at_least("vocab", args.vocab, 0);
  require_at_least("threads", threads, 1);
  const std::int64_t pairs = args.n * args.k;
  const std::int64_t bytes = pairs * args.dim * element_bytes(args.dtype);
  check_token_ids(args.token_ids, args.n, args.k, args.vocab);
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
  check_token_ids(args.token_ids, args.n, args.k, args.vocab);
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
