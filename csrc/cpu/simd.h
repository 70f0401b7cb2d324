// The vector layer: what every instruction set shares.
//
// An instruction set is a struct `Isa` (simd_*.h) with the vector types F32 and I32 of kWidth lanes, and the
// few operations that the compiler's vector extension cannot express: fma, max and min (of which the second
// argument is the result where one is NaN), sum and largest of the lanes,
// bits (one of each lane of a mask), scale (v 2^exponent), interleave (a0 b0 a1 b1 ... into a
// and then b), and the 16-bit conversions. Arithmetic, comparison and selection are plain operators on F32
// and I32.
//
// Everything lives in an anonymous namespace, and no std:: template is used: these headers are compiled once
// per instruction set, and nothing may be merged by the linker across those builds.
#pragma once

#include "core/dtype.h"

namespace pyqe::cpu {
namespace {

// 2 * kWidth consecutive elements. Which of the two vectors an element is in depends on the dtype; load and
// store agree, and sums do not care. So 16-bit elements need no shuffle.
template <class Isa>
struct Pair {
  typename Isa::F32 first, second;
};

template <class Isa>
constexpr std::int64_t kPairWidth = 2 * Isa::kWidth;

// Unsigned, because some lanes hold what is not used in the end: there sums may wrap around, which for signed
// numbers is undefined.
template <class Isa>
struct Bits {
  typedef std::uint32_t U32 __attribute__((vector_size(4 * Isa::kWidth)));
};

template <class Isa>
typename Bits<Isa>::U32 bits_of(typename Isa::F32 value) {
  return (typename Bits<Isa>::U32)value;
}

template <class Isa>
typename Isa::F32 float_from_bits(typename Bits<Isa>::U32 bits) {
  return (typename Isa::F32)bits;
}

template <class Isa>
typename Isa::F32 broadcast(float value) {
  return value - typename Isa::F32{};  // x - 0 is x for every x, so this folds into one instruction
}

template <class Isa>
Pair<Isa> load(const float* from) {
  // Vector by vector: gcc copies a Pair as a whole through the stack in pieces, 3 times slower.
  typename Isa::F32 first, second;
  __builtin_memcpy(&first, from, sizeof first);
  __builtin_memcpy(&second, from + Isa::kWidth, sizeof second);
  return {first, second};
}

template <class Isa>
Pair<Isa> load(const BFloat16* from) {
  typename Bits<Isa>::U32 words;
  __builtin_memcpy(&words, from, sizeof words);
  return {float_from_bits<Isa>(words << 16), float_from_bits<Isa>(words & 0xffff0000u)};
}

template <class Isa>
Pair<Isa> load(const Float16* from) {
  return {Isa::widen(from), Isa::widen(from + Isa::kWidth)};
}

template <class Isa>
void store(float* to, Pair<Isa> pair) {
  __builtin_memcpy(to, &pair.first, sizeof pair.first);
  __builtin_memcpy(to + Isa::kWidth, &pair.second, sizeof pair.second);
}

// The vector form of to_bfloat16, the rounded value left in the upper half of each lane.
template <class Isa>
typename Isa::I32 round_to_bfloat16(typename Isa::F32 value) {
  using I32 = typename Isa::I32;
  const auto bits = bits_of<Isa>(value);
  const auto rounded = bits + 0x7fff + (bits >> 16 & 1);
  return (I32)((value == value ? rounded : bits | 0x400000) & 0xffff0000u);
}

template <class Isa>
void store(BFloat16* to, Pair<Isa> pair) {
  const typename Isa::I32 low = round_to_bfloat16<Isa>(pair.first) >> 16 & 0xffff;
  const typename Isa::I32 words = low | round_to_bfloat16<Isa>(pair.second);
  __builtin_memcpy(to, &words, sizeof words);
}

template <class Isa>
void store(Float16* to, Pair<Isa> pair) {
  Isa::narrow(to, pair.first);
  Isa::narrow(to + Isa::kWidth, pair.second);
}

// One vector of fp32 as kWidth consecutive elements, rounded to nearest.
template <class Isa>
void narrow(float* to, typename Isa::F32 value) {
  __builtin_memcpy(to, &value, sizeof value);
}

template <class Isa>
void narrow(BFloat16* to, typename Isa::F32 value) {
  typedef std::uint16_t Halves __attribute__((vector_size(2 * Isa::kWidth)));
  const Halves halves = __builtin_convertvector(round_to_bfloat16<Isa>(value) >> 16, Halves);
  __builtin_memcpy(to, &halves, sizeof halves);
}

template <class Isa>
void narrow(Float16* to, typename Isa::F32 value) {
  Isa::narrow(to, value);
}

// One vector of kWidth consecutive elements as fp32.
template <class Isa>
typename Isa::F32 load_vector(const float* from) {
  typename Isa::F32 v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

template <class Isa, class T>
typename Isa::F32 load_vector(const T* from) {
  return Isa::widen(from);
}

// `count` elements as fp32.
template <class Isa, class T>
void widen(const T* from, std::int64_t count, float* to) {
  std::int64_t i = 0;
  for (; i + Isa::kWidth <= count; i += Isa::kWidth) narrow<Isa>(to + i, load_vector<Isa>(from + i));
  for (; i < count; ++i) to[i] = to_float(from[i]);
}

// The end of a row goes through a buffer, so that nothing past the row is read or written.
template <class Isa, class T>
Pair<Isa> load_partial(const T* from, std::int64_t count) {
  T buffer[kPairWidth<Isa>] = {};
  __builtin_memcpy(buffer, from, static_cast<std::size_t>(count) * sizeof(T));
  return load<Isa>(buffer);
}

template <class Isa, class T>
void store_partial(T* to, Pair<Isa> pair, std::int64_t count) {
  T buffer[kPairWidth<Isa>];
  store<Isa>(buffer, pair);
  __builtin_memcpy(to, buffer, static_cast<std::size_t>(count) * sizeof(T));
}

// Asks for the cache lines of [from, from + bytes) to come into L2: a whole row ahead of its use is too much
// for L1, and 1.4 times slower (docs/notes/cpu-token-logits.md). Any address is allowed: a prefetch never
// faults.
inline void prefetch(const void* from, std::int64_t bytes) {
  constexpr std::int64_t kLine = 64;
  constexpr int kRead = 0, kIntoL2 = 2;
  for (std::int64_t at = 0; at < bytes; at += kLine) {
    __builtin_prefetch(static_cast<const char*>(from) + at, kRead, kIntoL2);
  }
}

// v 2^exponent for integers from -127, which gives 0, to 127. A product, not an addition to the exponent's
// bits: it keeps NaN a NaN.
template <class Isa>
typename Isa::F32 scale_by_product(typename Isa::F32 v, typename Isa::F32 exponent) {
  const typename Isa::I32 biased = __builtin_convertvector(exponent, typename Isa::I32) + 127;
  return v * float_from_bits<Isa>((typename Bits<Isa>::U32)biased << 23);
}

// Calls body with a value of the C++ type that a dtype stands for.
template <class Body>
void with_element_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kBFloat16:
      return body(BFloat16{});
    case DType::kFloat16:
      return body(Float16{});
    case DType::kFloat64:
      return;  // rejected by the caller: fp64 never reaches a SIMD kernel
  }
}

}  // namespace
}  // namespace pyqe::cpu
