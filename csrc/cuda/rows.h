// How the row kernels see logits: a matrix that exists, or a product that was just made into a buffer, and
// what is still to be done to it. A kernel reads an element through `at`; nothing is written back.
#pragma once

#include "cuda/device.h"
#include "cuda/statistics.h"

namespace pyqe::cuda {

// With kPlain the elements are the logits.
template <class T, bool kPlain = false>
struct LogitRow {
  const T* logits;      // the row
  const float* bias;    // [vocab] or null
  const float* addend;  // the row of a second matrix, or null
  float row_scale, row_shift, scale, softcap;
  std::int64_t vocab;

  __device__ LogitRow(const Logits& all, std::int64_t row)
      : logits(static_cast<const T*>(all.matrix.data) + row * all.matrix.stride),
        bias(all.bias),
        addend(all.addend ? all.addend + row * all.vocab : nullptr),
        row_scale(all.row_scale ? all.row_scale[row] : 1.0f),
        row_shift(all.row_shift ? all.row_shift[row] : 0.0f),
        scale(all.scale),
        softcap(all.softcap),
        vocab(all.vocab) {}

  // The logit that an element stands for.
  __device__ float finish(float element, std::int64_t column) const {
    float z[1] = {element};
    if (!kPlain) finish_all(column, z);
    return z[0];
  }

  __device__ float at(std::int64_t column) const { return finish(as_float(logits[column]), column); }

  // Eight logits from a column that is a multiple of eight on; -infinity beyond the vocabulary. Reads 16
  // bytes at once where rows lie so that it can; which lane holds what is the same where not.
  __device__ void eight(std::int64_t column, float (&z)[8]) const { several<1>(column, 0, z); }

  // The same for several columns, `step` apart: all loads are under way before the first is used.
  template <int kColumns>
  __device__ void several(std::int64_t column, int step, float (&z)[kColumns * 8]) const {
    if (column + (kColumns - 1) * step + 8 <= vocab && is_aligned(logits + column)) {
      constexpr int kLoads = 8 / kPerLoad<T>;
      Vector<T> vectors[kColumns * kLoads];
#pragma unroll
      for (int i = 0; i < kColumns * kLoads; ++i)
        vectors[i] = load_once(logits + column + i / kLoads * step + i % kLoads * kPerLoad<T>);
#pragma unroll
      for (int i = 0; i < kColumns * 8; ++i) z[i] = as_float(vectors[i / kPerLoad<T>].items[i % kPerLoad<T>]);
    } else {
#pragma unroll
      for (int i = 0; i < kColumns * 8; ++i) {
        const std::int64_t at = column + i / 8 * step + i % 8;
        z[i] = at < vocab ? as_float(logits[at]) : -INFINITY;
      }
    }
    if (!kPlain) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i)
        finish_all(column + i * step, reinterpret_cast<float(&)[8]>(z[i * 8]));
    }
  }

 private:
  // From elements of the matrix to logits. What all elements have in common is asked once for all.
  template <int kCount>
  __device__ void finish_all(std::int64_t column, float (&z)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) z[i] *= row_scale;
    if (bias) add(bias, column, z);
    if (addend) add(addend, column, z);
#pragma unroll
    for (int i = 0; i < kCount; ++i) z[i] = (z[i] + row_shift) * scale;
    if (softcap > 0) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) z[i] = softcap * tanhf(z[i] / softcap);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (column + i >= vocab) z[i] = -INFINITY;
    }
  }

  template <int kCount>
  __device__ void add(const float* terms, std::int64_t column, float (&z)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (column + i < vocab) z[i] += terms[column + i];
    }
  }
};

inline bool is_plain(const Logits& logits) {
  return !logits.bias && !logits.addend && !logits.row_scale && !logits.row_shift && logits.scale == 1 &&
         logits.softcap == 0;
}

// A row of the second head's logits, made of the first one's.
struct CorrectedRow {
  const float *bias, *addend;
  float scale, shift;

  __device__ CorrectedRow(const Correction& all, std::int64_t row, std::int64_t vocab)
      : bias(all.bias),
        addend(all.addend ? all.addend + row * vocab : nullptr),
        scale(all.scale[row]),
        shift(all.shift[row]) {}

  __device__ float of(float z, std::int64_t column) const {
    z *= scale;
    if (bias) z += bias[column];
    if (addend) z += addend[column];
    return z + shift;
  }
};

}  // namespace pyqe::cuda
