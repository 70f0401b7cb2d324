// How the passes over the vocabulary run: work spread over threads, sums put together.
#include "cpu/vocab_bce.h"

#include <algorithm>
#include <vector>

#include "core/error.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/scan_driver.h"

namespace pyqe::cpu {
namespace {

std::int64_t parts(std::int64_t count, std::int64_t size) { return (count + size - 1) / size; }

// Floats at the start of a cache line.
class Buffer {
 public:
  explicit Buffer(std::int64_t floats) : memory_(static_cast<std::size_t>(floats) + 16) {}
  float* data() {
    const auto address = reinterpret_cast<std::uintptr_t>(memory_.data());
    return reinterpret_cast<float*>((address + 63) / 64 * 64);
  }

 private:
  std::vector<float> memory_;
};

std::vector<std::int64_t> sorted_rows(const std::int64_t* ids, std::int64_t n, std::int64_t k, int threads) {
  std::vector<std::int64_t> sorted(ids, ids + n * k);
  parallel_for(n, n * k * 8, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      std::sort(sorted.begin() + row * k, sorted.begin() + (row + 1) * k);
    }
  });
  return sorted;
}

// The group of blocks whose logits are computed while the one before it gives its gradients: two at least,
// for items enough that threads end together; more where there are many threads. No bit depends on it.
std::int64_t group_blocks(std::int64_t vocab, int threads) {
  return std::min<std::int64_t>(parts(vocab, kBlock), std::clamp(threads / 4, 2, 8));
}

// Items of each kind in one group.
struct Items {
  std::int64_t logits, grad_hidden, grad_weight;
};

void run_groups(const VocabBcePass& pass, const Items& items, int threads) {
  const VocabBce& args = *pass.args;
  const std::int64_t groups = parts(args.logits.vocab, pass.group_blocks * kBlock);
  const std::int64_t last_tiles = parts(args.logits.vocab, kTile) - (groups - 1) * items.logits;
  const std::int64_t bytes = pass.group_blocks * kBlock * args.logits.dim * element_bytes(args.logits.dtype);
  const auto compute = kernels().vocab_bce;
  for (std::int64_t group = 0; group <= groups; ++group) {
    const std::int64_t hidden = group > 0 ? items.grad_hidden : 0, weight = group > 0 ? items.grad_weight : 0;
    const std::int64_t logits = group < groups - 1 ? items.logits : group == groups - 1 ? last_tiles : 0;
    // The largest items first, so that the last to end are small.
    parallel_each(hidden + logits + weight, bytes, threads, [&](std::int64_t item, int) {
      if (item < hidden) return compute(pass, VocabBceWork::kGradHidden, group - 1, item);
      if (item < hidden + logits) return compute(pass, VocabBceWork::kLogits, group, item - hidden);
      compute(pass, VocabBceWork::kGradWeight, group - 1, item - hidden - logits);
    });
  }
}

void sum_rows(const VocabBcePass& pass, int threads) {
  const VocabBce& args = *pass.args;
  const std::int64_t n = args.logits.n, tiles = parts(args.logits.vocab, kTile);
  const std::int64_t bytes = n * tiles * static_cast<std::int64_t>(sizeof(RowSums));
  parallel_for(n, bytes, threads, [&](std::int64_t begin, std::int64_t end) {
    std::vector<RowSums> sums(static_cast<std::size_t>(end - begin));
    for (std::int64_t tile = 0; tile < tiles; ++tile) {
      const RowSums* part = pass.row_sums + tile * n + begin;
      for (RowSums& sum : sums) {
        sum.loss += part->loss, sum.shift += part->shift, sum.scale += part->scale;
        ++part;
      }
    }
    for (std::int64_t row = begin; row < end; ++row) {
      const RowSums& sum = sums[static_cast<std::size_t>(row - begin)];
      args.losses[row] = static_cast<float>(sum.loss);
      if (args.grad_shift) args.grad_shift[row] = static_cast<float>(sum.shift);
      if (args.grad_scale) args.grad_scale[row] = static_cast<float>(sum.scale);
    }
  });
  double total = 0;
  for (std::int64_t row = 0; row < n; ++row) {
    total += static_cast<double>(args.losses[row]) * static_cast<double>(args.row_weights[row]);
  }
  *args.total = static_cast<float>(total);
}

}  // namespace

void vocab_bce(const VocabBce& args, int threads) {
  const Logits& from = args.logits;
  check_logits(from, threads);
  require_at_least("n_exclude", args.n_exclude, 0);
  check_token_ids(args.targets, from.n, 1, from.vocab, "targets");
  check_token_ids(args.exclude_ids, from.n, args.n_exclude, from.vocab, "exclude");
  const auto compute = kernels().vocab_bce;
  VocabBcePass pass = {};
  pass.args = &args;
  pass.shape = kernels().vocab_bce_shape(from.dtype, from.n, from.dim);
  const std::vector<std::int64_t> excluded = sorted_rows(args.exclude_ids, from.n, args.n_exclude, threads);
  pass.excluded = excluded.data();
  const std::vector<float> rows = packed_rows(from, 0, from.n, threads);
  pass.packed_rows = rows.data();
  pass.padded_dim = parts(from.dim, 32) * 32;
  pass.grad_hidden_stride = pass.padded_dim + 32;  // rows must not fight for one set of the cache
  pass.gradient_rows = parts(from.n, pass.shape.panel_rows) * pass.shape.panel_rows;
  pass.group_blocks = group_blocks(from.vocab, threads);

  const bool products = args.grad_hidden || args.grad_weight;
  const std::int64_t group_floats = pass.group_blocks * pass.gradient_rows * pass.shape.gradient_words;
  Buffer gradients(products ? 2 * group_floats : 0);
  pass.gradients[0] = gradients.data();
  pass.gradients[1] = gradients.data() + group_floats;
  Buffer grad_hidden(args.grad_hidden ? from.n * pass.grad_hidden_stride : 0);
  pass.grad_hidden = grad_hidden.data();
  const std::int64_t row_blocks = args.grad_weight ? parts(from.n, kRowBlock) : 0;
  Buffer columns(row_blocks * pass.shape.row_block_steps * pass.padded_dim);
  pass.packed_columns = columns.data();
  std::vector<RowSums> row_sums(static_cast<std::size_t>(from.n * parts(from.vocab, kTile)));
  pass.row_sums = row_sums.data();

  Items items = {pass.group_blocks * (kBlock / kTile), 0, 0};
  if (args.grad_hidden) {
    // All rows at once, as an item packs weights for its own use, unless that leaves threads without an item.
    const std::int64_t strips = parts(from.dim, pass.shape.columns);
    const std::int64_t wanted = std::clamp<std::int64_t>(
        parts(2 * threads, std::max<std::int64_t>(strips, 1)), 1, std::max<std::int64_t>(from.n / 128, 1));
    pass.item_rows = parts(parts(from.n, wanted), pass.shape.panel_rows) * pass.shape.panel_rows;
    items.grad_hidden = from.n ? strips * parts(from.n, pass.item_rows) : 0;
  }
  if (args.grad_weight) {
    items.grad_weight = pass.group_blocks * parts(kBlock, pass.shape.tokens);
    parallel_each(row_blocks, from.n * from.dim * 4, threads,
                  [&](std::int64_t item, int) { compute(pass, VocabBceWork::kPackColumns, 0, item); });
  }
  run_groups(pass, items, threads);
  sum_rows(pass, threads);
  if (!args.grad_hidden) return;
  parallel_for(from.n, from.n * from.dim * 4, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) compute(pass, VocabBceWork::kFinish, 0, row);
  });
}

}  // namespace pyqe::cpu
