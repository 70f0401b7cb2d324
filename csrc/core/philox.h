// Counter-based random numbers: Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1,
// 2, 3"). The same numbers as pyqe/backends/philox.py.
#pragma once

#include <cstdint>

#include "core/host_device.h"

namespace pyqe {

// In [0, 1), with 53 random bits, for one draw of a row in a stream.
static PYQE_HOST_DEVICE inline double uniform(std::uint64_t seed, std::uint32_t stream, std::uint64_t row,
                                              std::uint32_t draw) {
  std::uint32_t c0 = draw, c1 = static_cast<std::uint32_t>(row), c2 = static_cast<std::uint32_t>(row >> 32),
                c3 = stream;
  std::uint32_t k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t product0 = std::uint64_t{0xD2511F53} * c0, product1 = std::uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<std::uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<std::uint32_t>(product1);
    c2 = static_cast<std::uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<std::uint32_t>(product0);
    k0 += 0x9E3779B9, k1 += 0xBB67AE85;
  }
  const std::uint64_t bits = std::uint64_t{c0} << 21 | c1 >> 11;
  return static_cast<double>(bits) * 0x1p-53;
}

}  // namespace pyqe
