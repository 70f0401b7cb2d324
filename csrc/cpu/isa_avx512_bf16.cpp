// AVX-512 with BF16: CMakeLists.txt sets the compiler flags of this file.
#include "cpu/simd_avx512_bf16.h"
#include "cpu/table.h"

namespace pyqe::cpu {

constexpr Kernels avx512_bf16_kernels = kernel_table<Avx512Bf16>();

}  // namespace pyqe::cpu
