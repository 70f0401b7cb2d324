// Marks the functions that CUDA kernels share with the code for the CPU.
#pragma once

#ifdef __CUDACC__
#define PYQE_HOST_DEVICE __host__ __device__
#else
#define PYQE_HOST_DEVICE
#endif
