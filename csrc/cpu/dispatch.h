// Which instruction set is used. The best that the processor and the operating system support, unless the
// environment variable PYQE_CPU_ISA names one; it is read at the first use.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace pyqe::cpu {

// Raises std::invalid_argument where PYQE_CPU_ISA names a level that is unknown or cannot run here.
const Kernels& kernels();
std::string isa();

std::vector<std::string> compiled_isas();   // best first
std::vector<std::string> available_isas();  // those of them that run here
std::vector<std::string> cpu_features();    // the instruction-set extensions that matter to this library

}  // namespace pyqe::cpu
