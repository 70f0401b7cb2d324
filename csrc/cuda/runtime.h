// What the kernels need of CUDA's runtime. For tests the same sources are compiled for a CPU, on an emulator
// of CUDA's threads (tests/cuda/emulator.h).
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef PYQE_CUDA_EMULATED
#include "emulator.h"
#else
#include <cuda_runtime.h>
#endif

namespace pyqe::cuda {

using Stream = cudaStream_t;

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

#ifdef PYQE_CUDA_EMULATED

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared, Stream,
            Arguments... arguments) {
  emulator::launch(kernel, grid, block, shared, arguments...);
}

template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(emulator::Block::current_block->shared());
}

#elif defined(__CUDACC__)

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// An empty grid is no launch at all: CUDA calls it an error.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared, Stream stream,
            Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared > 48 * 1024) {
    check(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
  }
  // clang-format off
  kernel<<<grid, block, shared, stream>>>(arguments...);
  // clang-format on
  check(cudaGetLastError());
}

template <class T>
__device__ T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}

#endif

}  // namespace pyqe::cuda
