// Statistics of rows with the memory that they are written to, poisoned.
#pragma once

#include "cpu/statistics.h"
#include "operands.h"

namespace pyqe::test {

struct SoftmaxResults {
  std::vector<float> max_logit, max_logprob, entropy, tempered, token_logits, topk_logits, mass;
  std::vector<std::int64_t> argmax, topk_ids, dominant_ids, size;
};

struct SoftmaxOptions {
  std::vector<std::int64_t> token_ids;  // [n, n_tokens]
  std::int64_t n_tokens = 0, top_k = 0, members = 0;
  double temperature = 1.7;
  DominantRule rule = {DominantKind::kNone, false, 0, 0, 0, 0};
};

inline SoftmaxResults softmax_stats(const cpu::Logits& logits, const SoftmaxOptions& options, int threads) {
  const auto n = static_cast<std::size_t>(logits.n), k = static_cast<std::size_t>(options.top_k);
  SoftmaxResults to;
  for (auto* values : {&to.max_logit, &to.max_logprob, &to.entropy, &to.tempered, &to.mass}) {
    values->assign(n, kPoison);
  }
  to.token_logits.assign(options.token_ids.size(), kPoison);
  to.topk_logits.assign(n * k, kPoison);
  to.topk_ids.assign(n * k, -7), to.argmax.assign(n, -7), to.size.assign(n, -7);
  to.dominant_ids.assign(n * static_cast<std::size_t>(options.members), -7);
  cpu::SoftmaxStats args = {};
  args.logits = logits;
  args.token_ids = options.token_ids.data();
  args.n_tokens = options.n_tokens, args.top_k = options.top_k, args.members = options.members;
  args.temperature = options.temperature;
  args.rule = options.rule;
  args.max_logit = to.max_logit.data(), args.max_logprob = to.max_logprob.data();
  args.entropy = to.entropy.data(), args.tempered = to.tempered.data();
  args.argmax = to.argmax.data();
  args.token_logits = to.token_logits.data();
  args.topk_logits = to.topk_logits.data(), args.topk_ids = to.topk_ids.data();
  args.dominant_ids = to.dominant_ids.data(), args.size = to.size.data(), args.mass = to.mass.data();
  cpu::softmax_stats(args, threads);
  return to;
}

struct SigmoidResults {
  std::vector<float> max_logit, sum_prob, token_logits, topk_logits;
  std::vector<std::int64_t> argmax, count_above, topk_ids;
};

struct SigmoidOptions {
  std::vector<std::int64_t> token_ids;  // [n, n_tokens]
  std::int64_t n_tokens = 0, top_k = 0;
  float threshold = 0.25f;
};

inline SigmoidResults sigmoid_stats(const cpu::Logits& logits, const SigmoidOptions& options, int threads) {
  const auto n = static_cast<std::size_t>(logits.n), k = static_cast<std::size_t>(options.top_k);
  SigmoidResults to;
  to.max_logit.assign(n, kPoison), to.sum_prob.assign(n, kPoison);
  to.token_logits.assign(options.token_ids.size(), kPoison);
  to.topk_logits.assign(n * k, kPoison);
  to.topk_ids.assign(n * k, -7), to.argmax.assign(n, -7), to.count_above.assign(n, -7);
  cpu::SigmoidStats args = {};
  args.logits = logits;
  args.token_ids = options.token_ids.data();
  args.n_tokens = options.n_tokens, args.top_k = options.top_k;
  args.threshold = options.threshold;
  args.max_logit = to.max_logit.data(), args.sum_prob = to.sum_prob.data();
  args.argmax = to.argmax.data(), args.count_above = to.count_above.data();
  args.token_logits = to.token_logits.data();
  args.topk_logits = to.topk_logits.data(), args.topk_ids = to.topk_ids.data();
  cpu::sigmoid_stats(args, threads);
  return to;
}

inline bool same_bits(const SoftmaxResults& a, const SoftmaxResults& b) {
  return same_bits(a.max_logit, b.max_logit) && same_bits(a.max_logprob, b.max_logprob) &&
         same_bits(a.entropy, b.entropy) && same_bits(a.tempered, b.tempered) &&
         same_bits(a.token_logits, b.token_logits) && same_bits(a.topk_logits, b.topk_logits) &&
         same_bits(a.mass, b.mass) && same_bits(a.argmax, b.argmax) && same_bits(a.topk_ids, b.topk_ids) &&
         same_bits(a.dominant_ids, b.dominant_ids) && same_bits(a.size, b.size);
}

inline bool same_bits(const SigmoidResults& a, const SigmoidResults& b) {
  return same_bits(a.max_logit, b.max_logit) && same_bits(a.sum_prob, b.sum_prob) &&
         same_bits(a.token_logits, b.token_logits) && same_bits(a.topk_logits, b.topk_logits) &&
         same_bits(a.argmax, b.argmax) && same_bits(a.count_above, b.count_above) &&
         same_bits(a.topk_ids, b.topk_ids);
}

}  // namespace pyqe::test
