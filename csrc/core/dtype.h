// Element types and their scalar conversions.
//
// Everything here is `static inline`: the header is compiled into files with different instruction-set
// flags, and internal linkage keeps the linker from merging, say, an AVX-512 copy of a helper into code
// that must run on any processor.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/host_device.h"

namespace pyqe {

// The codes that cross the language boundary.
enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

struct BFloat16 {
  std::uint16_t bits;
};

struct Float16 {
  std::uint16_t bits;
};

static PYQE_HOST_DEVICE inline std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

static PYQE_HOST_DEVICE inline float float_from_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

static PYQE_HOST_DEVICE inline float to_float(float value) { return value; }

static PYQE_HOST_DEVICE inline float to_float(BFloat16 value) {
  return float_from_bits(std::uint32_t{value.bits} << 16);
}

static PYQE_HOST_DEVICE inline float to_float(Float16 value) {
  const std::uint32_t sign = (value.bits & 0x8000u) << 16;
  const std::uint32_t exponent = (value.bits >> 10) & 0x1fu;
  const std::uint32_t mantissa = value.bits & 0x3ffu;
  std::uint32_t magnitude;
  if (exponent == 0) {
    magnitude = bits_of(static_cast<float>(mantissa) * 0x1p-24f);  // zero and subnormals, exact
  } else if (exponent == 0x1f) {
    magnitude = 0x7f800000u | mantissa << 13;
  } else {
    magnitude = (exponent + (127 - 15)) << 23 | mantissa << 13;
  }
  return float_from_bits(sign | magnitude);
}

// Both narrowing conversions round to nearest, ties to even, and keep NaN a NaN.
static PYQE_HOST_DEVICE inline BFloat16 to_bfloat16(float value) {
  const std::uint32_t bits = bits_of(value);
  if (value != value) return {static_cast<std::uint16_t>(bits >> 16 | 0x40u)};
  // A carry out of the mantissa moves into the exponent, which is the rounding up that is wanted.
  return {static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

static PYQE_HOST_DEVICE inline Float16 to_float16(float value) {
  const std::uint32_t sign = bits_of(value) >> 16 & 0x8000u;
  const std::uint32_t magnitude = bits_of(value) & 0x7fffffffu;
  std::uint32_t narrowed;
  if (magnitude > 0x7f800000u) {
    narrowed = 0x7e00u;
  } else if (magnitude >= bits_of(65520.0f)) {  // halfway between the largest finite value and the next
    narrowed = 0x7c00u;
  } else if (magnitude < bits_of(0x1p-14f)) {
    // The last bit of a float in [1/2, 1) is 2^-24, the spacing of fp16 subnormals: the sum rounds for us.
    narrowed = bits_of(float_from_bits(magnitude) + 0.5f) - bits_of(0.5f);
  } else {
    narrowed = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - ((127u - 15u) << 23)) >> 13;
  }
  return {static_cast<std::uint16_t>(sign | narrowed)};
}

}  // namespace pyqe
