// AVX-512 F, BW, DQ and VL: CMakeLists.txt sets the compiler flags of this file.
#include "cpu/simd_avx512.h"
#include "cpu/table.h"

namespace pyqe::cpu {

constexpr Kernels avx512_kernels = kernel_table<Avx512>();

}  // namespace pyqe::cpu
