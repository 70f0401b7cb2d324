// Pieces that the kernels share: conversions, loads of 16 bytes, reductions in a fixed order.
#pragma once

#include <cmath>

#include "core/dtype.h"
#include "cuda/runtime.h"

namespace pyqe::cuda {

__device__ inline float as_float(float value) { return value; }
__device__ inline float as_float(double value) { return static_cast<float>(value); }
__device__ inline float as_float(BFloat16 value) { return to_float(value); }
__device__ inline float as_float(Float16 value) {
#ifdef __CUDA_ARCH__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#else
  return to_float(value);
#endif
}

template <class T>
__device__ T narrowed(float value);
template <>
__device__ inline float narrowed<float>(float value) {
  return value;
}
template <>
__device__ inline BFloat16 narrowed<BFloat16>(float value) {
  return to_bfloat16(value);
}
template <>
__device__ inline Float16 narrowed<Float16>(float value) {
#ifdef __CUDA_ARCH__
  Float16 narrow;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
  return narrow;
#else
  return to_float16(value);
#endif
}

// The elements that 16 bytes hold, one load of a thread.
template <class T>
constexpr int kPerLoad = 16 / static_cast<int>(sizeof(T));

template <class T>
__device__ bool is_aligned(const T* address) {
  return reinterpret_cast<std::uintptr_t>(address) % 16 == 0;
}

template <class T, int kCount = kPerLoad<T>>
struct alignas(kCount * sizeof(T)) Vector {
  T items[kCount];
};

// 16 bytes that are read once: they need not displace anything in the caches.
template <class T>
__device__ Vector<T> load_once(const T* address) {
#ifdef PYQE_CUDA_EMULATED
  if (!is_aligned(address)) throw std::logic_error("a load of 16 bytes is not aligned");
#endif
  const uint4 bits = __ldcs(reinterpret_cast<const uint4*>(address));
  Vector<T> vector;
  memcpy(&vector, &bits, sizeof vector);
  return vector;
}

template <class T>
__device__ Vector<T> load(const T* address) {
#ifdef PYQE_CUDA_EMULATED
  if (!is_aligned(address)) throw std::logic_error("a load of 16 bytes is not aligned");
#endif
  const uint4 bits = *reinterpret_cast<const uint4*>(address);
  Vector<T> vector;
  memcpy(&vector, &bits, sizeof vector);
  return vector;
}

// 16 bytes that nothing here reads again.
template <class T>
__device__ void store_once(T* address, const Vector<T>& vector) {
#ifdef PYQE_CUDA_EMULATED
  if (!is_aligned(address)) throw std::logic_error("a store of 16 bytes is not aligned");
#endif
  uint4 bits;
  memcpy(&bits, &vector, sizeof bits);
  __stcs(reinterpret_cast<uint4*>(address), bits);
}

// 2^x by the special function unit: 2 units in the last place, 0 below 2^-126.
__device__ inline float exp2_of(float x) {
#ifdef __CUDA_ARCH__
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
#else
  return exp2f(x);
#endif
}

// e^x to about 1e-6, for x <= 0 or not: one multiplication and the special function unit.
__device__ inline float fast_exp(float x) { return exp2_of(x * 1.44269504f); }

__device__ inline float fast_sigmoid(float x) {
  const float power = 1.0f + fast_exp(-x);
#ifdef __CUDA_ARCH__
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(power));
  return inverse;
#else
  return 1.0f / power;
#endif
}

// The same in all lanes; always added in the same order.
template <class T>
__device__ T warp_sum(T value) {
  for (int bits = kWarp / 2; bits > 0; bits /= 2) value += __shfl_xor_sync(kAllLanes, value, bits);
  return value;
}

__device__ inline float warp_max(float value) {
  for (int bits = kWarp / 2; bits > 0; bits /= 2)
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, bits));
  return value;
}

// Threads of a block, warps of kWarp; scratch in shared memory: one element for each warp. All threads get
// it.
template <class T, class Warp, class Join>
__device__ T block_reduce(T value, T* scratch, const Warp& within_warp, const Join& join) {
  value = within_warp(value);
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  T result = scratch[0];
  for (int warp = 1; warp < warps; ++warp) result = join(result, scratch[warp]);
  __syncthreads();  // the scratch may be used again
  return result;
}

template <class T>
__device__ T block_sum(T value, T* scratch) {
  return block_reduce(value, scratch, [](T v) { return warp_sum(v); }, [](T a, T b) { return a + b; });
}

__device__ inline float block_max(float value, float* scratch) {
  return block_reduce(
      value, scratch, [](float v) { return warp_max(v); }, [](float a, float b) { return fmaxf(a, b); });
}

// body(T()) for the element type that a code names.
template <class Body>
void for_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float());
    case DType::kBFloat16:
      return body(BFloat16());
    case DType::kFloat16:
      return body(Float16());
    default:
      throw std::invalid_argument("dtype: expected float32, bfloat16 or float16");
  }
}

}  // namespace pyqe::cuda
