// Drawing tokens in two stages, a tile and then a token of that tile: what the CPU's code and the CUDA
// kernels share.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/host_device.h"

namespace pyqe {

// A distribution to draw `count` tokens from: the sum of its parts, each normalised, times their weights. The
// softmax part is proportional to e^(beta z) * factor, the unigram part to `counts`.
struct Source {
  double softmax, unigram, uniform;
  std::int64_t count;
};

// Sum of e^((z - max) beta) over the tokens of a tile.
struct TileSum {
  float max, sum;
};

constexpr std::int64_t kSpareDraws = 4;  // in a round, for what is drawn twice

// The value, or the largest number below the total: rounding may carry a value to the total itself, where
// nothing lies.
static PYQE_HOST_DEVICE inline double below(double value, double total) {
  std::uint64_t bits;
  std::memcpy(&bits, &total, sizeof bits);
  if (total > 0) bits -= 1;
  std::memcpy(&total, &bits, sizeof bits);
  return value < 0 ? 0 : value < total ? value : total;
}

}  // namespace pyqe
