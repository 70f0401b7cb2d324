// Token logits, forward and backward, over one instruction set.
//
// The work is a gather: D multiplications for each row of D elements that comes from anywhere in a weight
// of hundreds of megabytes. Memory decides, so the arithmetic is kept plain and the effort goes into asking
// for rows before they are needed.
#pragma once

#include "cpu/operations.h"
#include "cpu/simd.h"

namespace pyqe::cpu {
namespace {

template <class T>
const T* row_of(const Matrix& matrix, std::int64_t row) {
  return static_cast<const T*>(matrix.data) + row * matrix.stride;
}

// How many rows before its use a row is asked for: one, or several where one is read faster than memory
// answers.
template <class T>
std::int64_t rows_ahead(std::int64_t dim) {
  constexpr std::int64_t kBytesAhead = 8192;
  return 1 + kBytesAhead / (dim * static_cast<std::int64_t>(sizeof(T)) + 1);
}

// Reads all of `upcoming`, a row of the same length, into the cache along the way.
template <class Isa, class T>
float dot(const T* x, const T* y, std::int64_t dim, const T* upcoming) {
  using F32 = typename Isa::F32;
  constexpr std::int64_t kPair = kPairWidth<Isa>;
  // Four independent sums hide the latency of the fused multiply-add.
  F32 sums[4] = {};
  const auto accumulate = [&](Pair<Isa> a, Pair<Isa> b, int sum) {
    sums[sum] = Isa::fma(a.first, b.first, sums[sum]);
    sums[sum + 1] = Isa::fma(a.second, b.second, sums[sum + 1]);
  };
  std::int64_t d = 0;
  for (; d + 2 * kPair <= dim; d += 2 * kPair) {
    prefetch(upcoming + d, 2 * kPair * sizeof(T));
    accumulate(load<Isa>(x + d), load<Isa>(y + d), 0);
    accumulate(load<Isa>(x + d + kPair), load<Isa>(y + d + kPair), 2);
  }
  if (d + kPair <= dim) {
    accumulate(load<Isa>(x + d), load<Isa>(y + d), 0);
    d += kPair;
  }
  if (d < dim) accumulate(load_partial<Isa>(x + d, dim - d), load_partial<Isa>(y + d, dim - d), 2);
  return Isa::sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class Isa, class T>
void token_logits_forward(const TokenLogitsForward& args, std::int64_t begin, std::int64_t end) {
  const std::int64_t ahead = rows_ahead<T>(args.dim);
  const T* bias = static_cast<const T*>(args.bias);
  for (std::int64_t pair = begin; pair < end; ++pair) {
    const std::int64_t token = args.token_ids[pair];
    if (token < 0) {
      args.logits[pair] = __builtin_nanf("");
      continue;
    }
    const std::int64_t later = pair + ahead < end ? args.token_ids[pair + ahead] : token;
    const float sum = dot<Isa>(row_of<T>(args.hidden, pair / args.k), row_of<T>(args.weight, token), args.dim,
                               row_of<T>(args.weight, later < 0 ? token : later));
    args.logits[pair] = bias ? sum + to_float(bias[token]) : sum;
  }
}

template <class T>
struct Term {
  float coefficient;
  const T* row;       // null: no term
  const T* upcoming;  // a row that a later sum needs: it is read into the cache along the way
};

// The columns from d on of a weighted sum of rows, in registers: kPairs pairs of vectors, or, where kPairs is
// 0, the last `rest` columns.
template <class Isa, int kPairs, class T, class Terms>
void weighted_sum_strip(T* out, std::int64_t d, std::int64_t rest, std::int64_t count, const Terms& term) {
  constexpr bool kWhole = kPairs > 0;
  constexpr int kSums = kWhole ? kPairs : 1;
  constexpr std::int64_t kPair = kPairWidth<Isa>;
  typename Isa::F32 first[kSums], second[kSums];
  for (int s = 0; s < kSums; ++s) first[s] = second[s] = broadcast<Isa>(0.0f);
  for (std::int64_t i = 0; i < count; ++i) {
    const Term<T> t = term(i);
    if (!t.row) continue;
    prefetch(t.upcoming + d, kSums * kPair * static_cast<std::int64_t>(sizeof(T)));
    const typename Isa::F32 coefficient = broadcast<Isa>(t.coefficient);
    for (int s = 0; s < kSums; ++s) {
      const T* from = t.row + d + s * kPair;
      const Pair<Isa> row = kWhole ? load<Isa>(from) : load_partial<Isa>(from, rest);
      first[s] = Isa::fma(coefficient, row.first, first[s]);
      second[s] = Isa::fma(coefficient, row.second, second[s]);
    }
  }
  for (int s = 0; s < kSums; ++s) {
    T* to = out + d + s * kPair;
    const Pair<Isa> sum = {first[s], second[s]};
    kWhole ? store<Isa>(to, sum) : store_partial<Isa>(to, sum, rest);
  }
}

// out[:] = sum_i coefficient_i row_i[:] over `count` terms in that order. Strip by strip: no buffer is needed
// and each element of `out` is written once.
template <class Isa, class T, class Terms>
void weighted_sum(T* out, std::int64_t dim, std::int64_t count, const Terms& term) {
  constexpr std::int64_t kPair = kPairWidth<Isa>;
  // 64 columns with AVX2 and AVX-512; wider strips are slower (docs/notes/cpu-token-logits.md).
  constexpr int kStrip = Isa::kWidth < 16 ? 4 : 2;
  std::int64_t d = 0;
  for (; d + kStrip * kPair <= dim; d += kStrip * kPair) {
    weighted_sum_strip<Isa, kStrip>(out, d, 0, count, term);
  }
  for (; d + kPair <= dim; d += kPair) weighted_sum_strip<Isa, 1>(out, d, 0, count, term);
  if (d < dim) weighted_sum_strip<Isa, 0>(out, d, dim - d, count, term);
}

template <class Isa, class T>
void token_logits_backward_hidden(const TokenLogitsBackwardHidden& args, std::int64_t begin,
                                  std::int64_t end) {
  const std::int64_t ahead = args.k > rows_ahead<T>(args.dim) ? args.k : rows_ahead<T>(args.dim);
  for (std::int64_t n = begin; n < end; ++n) {
    weighted_sum<Isa>(
        static_cast<T*>(args.grad_hidden) + n * args.dim, args.dim, args.k, [&](std::int64_t k) {
          const std::int64_t pair = n * args.k + k, token = args.token_ids[pair];
          if (token < 0) return Term<T>{};
          const std::int64_t later = pair + ahead < end * args.k ? args.token_ids[pair + ahead] : token;
          return Term<T>{args.grad[pair], row_of<T>(args.weight, token),
                         row_of<T>(args.weight, later < 0 ? token : later)};
        });
  }
}

template <class Isa, class T>
void token_logits_backward_weight(const TokenLogitsBackwardWeight& args, std::int64_t begin,
                                  std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    const std::int64_t first = args.row_starts[row], count = args.row_starts[row + 1] - first;
    const std::int64_t ahead = count > rows_ahead<T>(args.dim) ? count : rows_ahead<T>(args.dim);
    const std::int64_t out_row = args.row_ids ? args.row_ids[row] : row;
    weighted_sum<Isa>(static_cast<T*>(args.grad_weight) + out_row * args.stride, args.dim, count,
                      [&](std::int64_t i) {
                        const std::int64_t pair = args.pairs[first + i];
                        const std::int64_t later =
                            first + i + ahead < args.row_starts[end] ? args.pairs[first + i + ahead] : pair;
                        return Term<T>{args.grad[pair], row_of<T>(args.hidden, pair / args.k),
                                       row_of<T>(args.hidden, later / args.k)};
                      });
  }
}

}  // namespace
}  // namespace pyqe::cpu
