// Elementary functions of one instruction set, over arrays. vector_math_level.cpp defines a table for each.
#pragma once

#include <cstdint>

namespace pyqe::test {

struct VectorMath {
  // `count` is a multiple of 16.
  void (*exp)(const float* x, float* y, std::int64_t count);
  void (*log)(const float* x, float* y, std::int64_t count);
  void (*sigmoid)(const float* x, float* y, std::int64_t count);
  void (*tanh)(const float* x, float* y, std::int64_t count);
};

extern const VectorMath portable_math, avx2_math, avx512_math;

}  // namespace pyqe::test
