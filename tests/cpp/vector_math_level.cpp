// Compiled once for each width of vectors, with its flags: LEVEL is portable, avx2 or avx512, ISA its struct.
#include "cpu/inverse_softmax_kernels.h"
#include "cpu/vector_math.h"
#include LEVEL_HEADER
#include "vector_math.h"

namespace pyqe::test {
namespace {

using cpu::ISA;

template <class Function>
void apply(const Function& function, const float* x, float* y, std::int64_t count) {
  for (std::int64_t i = 0; i < count; i += ISA::kWidth) {
    ISA::F32 v;
    __builtin_memcpy(&v, x + i, sizeof v);
    v = function(v);
    __builtin_memcpy(y + i, &v, sizeof v);
  }
}

}  // namespace

constexpr VectorMath LEVEL_MATH = {
    [](const float* x, float* y, std::int64_t n) {
      apply([](ISA::F32 v) { return cpu::exp<ISA>(v); }, x, y, n);
    },
    [](const float* x, float* y, std::int64_t n) {
      apply([](ISA::F32 v) { return cpu::log<ISA>(v); }, x, y, n);
    },
    [](const float* x, float* y, std::int64_t n) {
      apply([](ISA::F32 v) { return cpu::sigmoid<ISA>(v); }, x, y, n);
    },
    [](const float* x, float* y, std::int64_t n) {
      apply([](ISA::F32 v) { return cpu::tanh<ISA>(v); }, x, y, n);
    },
};

}  // namespace pyqe::test
