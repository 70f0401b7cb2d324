// Tensor cores and asynchronous copies on the emulator of CUDA's threads.
#pragma once

#include "emulator.h"

namespace emulator {

// Copies run as early as they may, or, when fibers run in descending order, as late: a stage that is filled
// while others still read it shows in the first, a missing wait in the second.
inline void copy_async(void* shared, const void* global, bool valid) {
  const auto misaligned = [](const void* address) {
    return reinterpret_cast<std::uintptr_t>(address) % 16 != 0;
  };
  if (misaligned(shared) || misaligned(global)) throw std::logic_error("a copy of 16 bytes is not aligned");
  Copies& copies = Block::current_block->copies();
  copies.open.push_back([=] {
    if (valid) {
      std::memcpy(shared, global, 16);
    } else {
      std::memset(shared, 0, 16);
    }
  });
  if (!reverse_order()) copies.run(copies.open);
}

inline void commit_copies() {
  Copies& copies = Block::current_block->copies();
  copies.groups.push_back(std::move(copies.open));
  copies.open.clear();
}

inline void wait_for_copies(std::size_t groups) {
  Copies& copies = Block::current_block->copies();
  while (copies.groups.size() > groups) {
    copies.run(copies.groups.front());
    copies.groups.pop_front();
  }
}

// mma.m16n8k16 for 16-bit elements with fp32 sums, by the tables of the PTX ISA ("Matrix Fragments for
// mma.m16n8k16 with floating point type"): element i of a lane's fragment lies in row and column
//   a: groupID (+ 8 for i = 2, 3, 6, 7), 2 threadID_in_group + i % 2 (+ 8 for i >= 4)
//   b: 2 threadID_in_group + i % 2 (+ 8 for i >= 2), groupID
//   c: groupID (+ 8 for i >= 2), 2 threadID_in_group + i % 2
template <class Widen>
void mma_16816(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], const Widen& widen) {
  struct Fragments {
    std::uint16_t a[8], b[4];
  } mine;
  std::memcpy(mine.a, a, sizeof mine.a);
  std::memcpy(mine.b, b, sizeof mine.b);
  float left[16][16], right[16][8];
  exchange(0xffffffffu, &mine, [&](const auto& of) {
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      const Fragments& theirs = *of(lane);
      const unsigned group = lane >> 2, thread = lane % 4;
      for (unsigned i = 0; i < 8; ++i) {
        const bool upper = i < 2 || (4 <= i && i < 6);
        left[upper ? group : group + 8][thread * 2 + (i & 1) + (i < 4 ? 0 : 8)] = widen(theirs.a[i]);
      }
      for (unsigned i = 0; i < 4; ++i)
        right[thread * 2 + (i & 1) + (i < 2 ? 0 : 8)][group] = widen(theirs.b[i]);
    }
    return 0;
  });
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = (lane() >> 2) + (i < 2 ? 0 : 8), column = lane() % 4 * 2 + (i & 1);
    for (unsigned k = 0; k < 16; ++k) c[i] += left[row][k] * right[k][column];
  }
}

}  // namespace emulator
