// Memory of a thread for intermediate results.
#pragma once

#include <cstdint>

namespace pyqe::cpu {

// A buffer of the calling thread, 64-byte aligned, that is reused from call to call.
float* scratch(std::int64_t floats);

}  // namespace pyqe::cpu
