// Takes the place of dispatch.cpp in the program that runs the AMX level on emulated tiles.
#include "cpu/dispatch.h"

namespace pyqe::cpu {

const Kernels& kernels() { return amx_kernels; }

std::string isa() { return "amx"; }

// Everything but the tiles runs as it is.
std::vector<std::string> available_isas() {
  if (__builtin_cpu_supports("avx512bf16")) return {"amx"};
  return {};
}

}  // namespace pyqe::cpu
