// The tensor cores' product, and the asynchronous copies into shared memory that feed it (sm_80 and later).
#pragma once

#include "cuda/device.h"

#ifdef PYQE_CUDA_EMULATED
#include "emulator_tensor_core.h"
#endif

namespace pyqe::cuda {

// acc += a b: a is 16 x 16, b 16 x 8, spread over a warp as the PTX ISA lays out mma.m16n8k16.
#ifdef PYQE_CUDA_EMULATED
template <class T>
void mma_16816(float (&acc)[4], const unsigned (&a)[4], const unsigned (&b)[2], T) {
  emulator::mma_16816(acc, a, b, [](std::uint16_t bits) { return to_float(T{bits}); });
}
#else
#define PYQE_MMA_16816(type)                                                 \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])               \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
__device__ inline void mma_16816(float (&acc)[4], const unsigned (&a)[4], const unsigned (&b)[2], BFloat16) {
  PYQE_MMA_16816("bf16");
}
__device__ inline void mma_16816(float (&acc)[4], const unsigned (&a)[4], const unsigned (&b)[2], Float16) {
  PYQE_MMA_16816("f16");
}
#undef PYQE_MMA_16816
#endif

// What L2 does with lines that copies bring in.
using CachePolicy = std::uint64_t;

// For data that is read once: its lines are the first to go, before what others will read again.
__device__ inline CachePolicy evict_first() {
  CachePolicy policy = 0;
#ifdef __CUDA_ARCH__
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
#endif
  return policy;
}

__device__ inline CachePolicy evict_normal() {
  CachePolicy policy = 0;
#ifdef __CUDA_ARCH__
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
#endif
  return policy;
}

// Starts a copy of 16 bytes to shared memory, of zeros where they are not valid. Both addresses are multiples
// of 16. It belongs to the thread's group that the next commit_copies() closes.
__device__ inline void copy_async(void* shared, const void* global, bool valid, CachePolicy policy) {
#ifdef PYQE_CUDA_EMULATED
  static_cast<void>(policy);
  emulator::copy_async(shared, global, valid);
#else
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(shared))),
               "l"(global), "r"(valid ? 16 : 0), "l"(policy)
               : "memory");
#endif
}

__device__ inline void commit_copies() {
#ifdef PYQE_CUDA_EMULATED
  emulator::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until at most kGroups of this thread's groups, the latest ones, are under way. Others see the copies after
// a barrier.
template <int kGroups>
__device__ void wait_for_copies() {
#ifdef PYQE_CUDA_EMULATED
  emulator::wait_for_copies(kGroups);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#endif
}

}  // namespace pyqe::cuda
