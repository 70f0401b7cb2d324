// AMX with BF16 tiles, beside AVX-512: CMakeLists.txt sets the compiler flags of this file.
#include "cpu/simd_amx.h"
#include "cpu/table.h"

namespace pyqe::cpu {

constexpr Kernels amx_kernels = kernel_table<Amx>();

}  // namespace pyqe::cpu
