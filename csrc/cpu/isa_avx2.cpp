// AVX2, FMA and F16C: CMakeLists.txt sets the compiler flags of this file.
#include "cpu/simd_avx2.h"
#include "cpu/table.h"

namespace pyqe::cpu {

constexpr Kernels avx2_kernels = kernel_table<Avx2>();

}  // namespace pyqe::cpu
