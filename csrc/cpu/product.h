// Matrix products of packed operands, A [rows, dim] times B [columns, dim] transposed, in fp32.
//
// An element of the result is one chain of fused multiply-adds over k = 0, 1, 2, ... in one register,
// whatever the number of rows and columns around it: so a row gives the same bits alone and among others.
//
// Operands are packed in words of 32 bits, a float each or two bf16 that the processor multiplies as a pair:
//   A in panels of kRows rows,       [panel][step][row]
//   B in panels of kColumns columns, [panel][step][column]
// with zeros where a panel is not full. `depth` is the number of steps, words of a row. A may also stay a
// row-major matrix, of rows a fixed number of words apart. What is packed has its rows along the reduction;
// the functions pack_transposed_* take matrices whose columns are.
#pragma once

#include "cpu/operations.h"
#include "cpu/simd.h"

namespace pyqe::cpu {
namespace {

// Which rows of a matrix: first, first + 1, ..., or those that are listed.
struct Rows {
  const Matrix* matrix;
  const std::int64_t* list;
  std::int64_t first;

  template <class T>
  const T* at(std::int64_t i) const {
    const std::int64_t row = list ? list[first + i] : first + i;
    return static_cast<const T*>(matrix->data) + row * matrix->stride;
  }
};

// Words that hold one element, widened to fp32.
template <class Isa, class T>
struct SingleWords {
  static constexpr int kElements = 1;
  static typename Isa::F32 accumulate(typename Isa::F32 sum, typename Isa::F32 a, typename Isa::F32 b) {
    return Isa::fma(a, b, sum);
  }
  using Element = float;  // what a word is made of
  static float word(const T* row, std::int64_t step, std::int64_t) { return to_float(row[step]); }
  static typename Isa::F32 words(const T* from) { return load_vector<Isa>(from); }
  static typename Isa::F32 words_across(const T* row, const T*) { return words(row); }
};

// Words that hold two bf16.
template <class Isa>
struct PairWords {
  static constexpr int kElements = 2;
  static typename Isa::F32 accumulate(typename Isa::F32 sum, typename Isa::F32 a, typename Isa::F32 b) {
    return Isa::dot(sum, a, b);
  }
  static float word(const BFloat16* row, std::int64_t step, std::int64_t dim) {
    BFloat16 pair[2] = {row[2 * step], {0}};
    if (2 * step + 1 < dim) pair[1] = row[2 * step + 1];
    float word;
    __builtin_memcpy(&word, pair, sizeof word);
    return word;
  }
  using Element = BFloat16;
  static typename Isa::F32 words(const BFloat16* from) {
    typename Isa::F32 v;
    __builtin_memcpy(&v, from, sizeof v);
    return v;
  }
  // The first elements of a row and the row after it as pairs; null stands for zeros.
  static typename Isa::F32 words_across(const BFloat16* row, const BFloat16* next) {
    const auto low = bits_of<Isa>(Isa::widen(row)) >> 16;
    return float_from_bits<Isa>(next ? low | bits_of<Isa>(Isa::widen(next)) : low);
  }
};

// kWidth vectors as rows of a square: the transposed square. Each stage moves the highest bit of (row, lane),
// seen as one number, to its end; after log2(kWidth) stages rows and lanes have changed places.
template <class Isa>
__attribute__((always_inline)) inline void transpose(typename Isa::F32 (&square)[Isa::kWidth]) {
  constexpr int kHalf = Isa::kWidth / 2;
#pragma GCC unroll 4
  for (int stage = 1; stage < Isa::kWidth; stage *= 2) {
    typename Isa::F32 next[Isa::kWidth];
#pragma GCC unroll 8
    for (int i = 0; i < kHalf; ++i) {
      next[2 * i] = square[i], next[2 * i + 1] = square[i + kHalf];
      Isa::interleave(next[2 * i], next[2 * i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < Isa::kWidth; ++i) square[i] = next[i];
  }
}

// Products by broadcast: every word of a row of A meets a vector of columns of B.
template <class Isa, class T, class Words>
struct BroadcastProduct {
  using F32 = typename Isa::F32;
  static constexpr int kRows = Isa::kRows, kColumns = 2 * Isa::kWidth;

  using Element = typename Words::Element;

  struct Session {};  // what a thread must hold while it multiplies

  static std::int64_t depth(std::int64_t dim) { return (dim + Words::kElements - 1) / Words::kElements; }

  static void pack_rows(const Rows& rows, std::int64_t count, std::int64_t dim, float* panel) {
    const std::int64_t steps = depth(dim);
    if (count < kRows) __builtin_memset(panel, 0, static_cast<std::size_t>(steps) * kRows * sizeof(float));
    for (std::int64_t r = 0; r < count; ++r) {
      const T* row = rows.at<T>(r);
      for (std::int64_t step = 0; step < steps; ++step) panel[step * kRows + r] = Words::word(row, step, dim);
    }
  }

  static void pack_columns(const Rows& rows, std::int64_t count, std::int64_t dim, float* panel) {
    constexpr int kWidth = Isa::kWidth, kRead = 0, kIntoL2 = 2;
    // The rows that come next: a processor's own prefetching does not follow 16 rows at a time. A prefetch
    // never faults.
    const std::int64_t ahead = kWidth * rows.matrix->stride;
    const std::int64_t steps = depth(dim), whole = dim / Words::kElements / kWidth * kWidth;
    for (int half = 0; half < kColumns; half += kWidth) {
      const T* row[kWidth];
      for (int i = 0; i < kWidth; ++i) row[i] = half + i < count ? rows.at<T>(half + i) : nullptr;
      float* out = panel + half;
      std::int64_t step = 0;
      for (; step < whole && half + kWidth <= count; step += kWidth, out += kWidth * kColumns) {
        F32 square[kWidth];
        for (int i = 0; i < kWidth; ++i) {
          square[i] = Words::words(row[i] + step * Words::kElements);
          __builtin_prefetch(row[i] + ahead + step * Words::kElements, kRead, kIntoL2);
        }
        transpose<Isa>(square);
        for (int i = 0; i < kWidth; ++i) __builtin_memcpy(out + i * kColumns, &square[i], sizeof(F32));
      }
      for (; step < steps; ++step, out += kColumns) {
        for (int i = 0; i < kWidth; ++i) out[i] = row[i] ? Words::word(row[i], step, dim) : 0.0f;
      }
    }
  }

  // The first kRows columns of a matrix [dim, ...] as the rows of a panel. Whole vectors are read.
  static void pack_transposed_rows(const T* from, std::int64_t stride, std::int64_t dim, float* panel) {
    static_assert(kRows <= Isa::kWidth, "a step of a panel is part of one vector");
    for (std::int64_t k = 0; k < dim; k += Words::kElements, panel += kRows) {
      const T* row = from + k * stride;
      const F32 words = Words::words_across(row, k + 1 < dim ? row + stride : nullptr);
      __builtin_memcpy(panel, &words, kRows * sizeof(float));
    }
  }

  // The columns [first, first + count) of dim rows of a matrix as panels of `steps` steps.
  static void pack_transposed_columns(const Rows& rows, std::int64_t dim, std::int64_t first,
                                      std::int64_t count, std::int64_t steps, float* panels) {
    // Rows are pages apart, so the processor itself does not see the next one coming.
    constexpr std::int64_t kWidth = Isa::kWidth, kAhead = 16;
    for (std::int64_t step = 0; step < steps; ++step, panels += kColumns) {
      const std::int64_t k = step * Words::kElements;
      const T* row = k < dim ? rows.at<T>(k) + first : nullptr;
      const T* next = k + 1 < dim ? rows.at<T>(k + 1) + first : nullptr;
      for (std::int64_t ahead = k + kAhead; ahead < k + kAhead + Words::kElements && ahead < dim; ++ahead) {
        prefetch(rows.at<T>(ahead) + first, count * static_cast<std::int64_t>(sizeof(T)));
      }
      for (std::int64_t c = 0; c < count; c += kColumns) {
        for (std::int64_t i = c; i < c + kColumns; i += kWidth) {
          const F32 words = row ? words_of_columns(row + i, next ? next + i : nullptr, count - i) : F32{};
          __builtin_memcpy(panels + c * steps + (i - c), &words, sizeof words);
        }
      }
    }
  }

  static F32 words_of_columns(const T* row, const T* next, std::int64_t count) {
    if (count >= Isa::kWidth) return Words::words_across(row, next);
    T ends[2][Isa::kWidth] = {};
    const std::size_t bytes = count > 0 ? static_cast<std::size_t>(count) * sizeof(T) : 0;
    __builtin_memcpy(ends[0], row, bytes);
    if (next) __builtin_memcpy(ends[1], next, bytes);
    return Words::words_across(ends[0], ends[1]);
  }

  // c[r, :] = the products of row r with the columns of one panel. Rows of A are a panel, or kStride words
  // apart.
  template <int kCount, std::int64_t kStride>
  __attribute__((noinline)) static void multiply_rows(const float* a, const float* b, std::int64_t steps,
                                                      float* c, std::int64_t stride) {
    constexpr std::int64_t kRow = kStride ? kStride : 1, kStep = kStride ? 1 : kRows;
    F32 sums[kCount][2] = {};
    for (std::int64_t step = 0; step < steps; ++step, a += kStep, b += kColumns) {
      F32 left, right;
      __builtin_memcpy(&left, b, sizeof left);
      __builtin_memcpy(&right, b + Isa::kWidth, sizeof right);
#pragma GCC unroll 16
      for (int r = 0; r < kCount; ++r) {
        const F32 word = broadcast<Isa>(a[r * kRow]);
        sums[r][0] = Words::accumulate(sums[r][0], word, left);
        sums[r][1] = Words::accumulate(sums[r][1], word, right);
      }
    }
    for (int r = 0; r < kCount; ++r) __builtin_memcpy(c + r * stride, sums[r], sizeof sums[r]);
  }

  template <std::int64_t kStride = 0>
  static void multiply(std::int64_t rows, const float* a, const float* b, std::int64_t steps, float* c,
                       std::int64_t stride) {
    if (rows == 1) return multiply_rows<1, kStride>(a, b, steps, c, stride);
    if (rows == 2) return multiply_rows<2, kStride>(a, b, steps, c, stride);
    if (rows <= 4) return multiply_rows<4, kStride>(a, b, steps, c, stride);
    if (kRows > 8 && rows <= 8)
      return multiply_rows<(kRows > 8 ? 8 : kRows), kStride>(a, b, steps, c, stride);
    multiply_rows<kRows, kStride>(a, b, steps, c, stride);
  }
};

template <class Isa, class T, bool kPairs = Isa::kBf16Pairs, bool kTiles = Isa::kBf16Tiles>
struct ProductOf {
  using Type = BroadcastProduct<Isa, T, SingleWords<Isa, T>>;
};

template <class Isa>
struct ProductOf<Isa, BFloat16, true, false> {
  using Type = BroadcastProduct<Isa, BFloat16, PairWords<Isa>>;
};

}  // namespace
}  // namespace pyqe::cpu
