// The processor's baseline: CMakeLists.txt sets the compiler flags of this file.
#include "cpu/simd_portable.h"
#include "cpu/table.h"

namespace pyqe::cpu {

constexpr Kernels portable_kernels = kernel_table<Portable>();

}  // namespace pyqe::cpu
