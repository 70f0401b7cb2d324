// Random operands of the operations, in memory that ends where they end.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "core/dtype.h"
#include "cpu/operations.h"

namespace pyqe::test {

constexpr double kFloatEps = std::numeric_limits<float>::epsilon();
constexpr float kPoison = 12345;  // what results hold before the operation runs

template <class T>
T narrowed(double value);

template <>
inline float narrowed<float>(double value) {
  return static_cast<float>(value);
}

template <>
inline BFloat16 narrowed<BFloat16>(double value) {
  return to_bfloat16(static_cast<float>(value));
}

template <>
inline Float16 narrowed<Float16>(double value) {
  return to_float16(static_cast<float>(value));
}

template <class T>
constexpr DType dtype_of();

template <>
constexpr DType dtype_of<float>() {
  return DType::kFloat32;
}

template <>
constexpr DType dtype_of<BFloat16>() {
  return DType::kBFloat16;
}

template <>
constexpr DType dtype_of<Float16>() {
  return DType::kFloat16;
}

// What rounding `value` to T may change.
template <class T>
double rounding_of(double value) {
  constexpr DType kDtype = dtype_of<T>();
  constexpr double kEps =
      kDtype == DType::kFloat32 ? kFloatEps : (kDtype == DType::kBFloat16 ? 0x1p-7 : 0x1p-10);
  constexpr double kSmallestNormal = kDtype == DType::kFloat16 ? 0x1p-14 : 0x1p-126;
  return kEps * std::fmax(std::fabs(value), kSmallestNormal);
}

// Rows `stride` elements apart, with NaN between them; the memory ends with the last element of the last row.
template <class T>
struct Operand {
  std::int64_t rows, columns, stride;
  std::vector<T> elements;

  Operand(std::int64_t n_rows, std::int64_t n_columns, std::int64_t padding = 0)
      : rows(n_rows),
        columns(n_columns),
        stride(n_columns + padding),
        elements(static_cast<std::size_t>(n_rows ? (n_rows - 1) * stride + n_columns : 0),
                 narrowed<T>(std::nan(""))) {}

  T& operator()(std::int64_t row, std::int64_t column) {
    return elements[static_cast<std::size_t>(row * stride + column)];
  }
  double at(std::int64_t row, std::int64_t column) const {
    return to_float(elements[static_cast<std::size_t>(row * stride + column)]);
  }
  cpu::Matrix matrix() const { return {elements.data(), stride}; }
};

using Generator = std::mt19937;

template <class T>
Operand<T> random_operand(Generator& random, std::int64_t rows, std::int64_t columns, double deviation = 1,
                          std::int64_t padding = 3) {
  std::normal_distribution<double> normal(0, deviation);
  Operand<T> operand(rows, columns, padding);
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t c = 0; c < columns; ++c) operand(r, c) = narrowed<T>(normal(random));
  }
  return operand;
}

// Ids below `vocab`, every fifth of them -1.
inline std::vector<std::int64_t> random_ids(Generator& random, std::int64_t count, std::int64_t vocab) {
  std::uniform_int_distribution<std::int64_t> uniform(0, vocab - 1);
  std::vector<std::int64_t> ids(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = i % 5 == 4 ? -1 : uniform(random);
  return ids;
}

template <class Value>
bool same_bits(const Value* a, const Value* b, std::int64_t count) {
  return count == 0 || std::memcmp(a, b, static_cast<std::size_t>(count) * sizeof(Value)) == 0;
}

template <class Value>
bool same_bits(const std::vector<Value>& a, const std::vector<Value>& b) {
  return a.size() == b.size() && same_bits(a.data(), b.data(), static_cast<std::int64_t>(a.size()));
}

}  // namespace pyqe::test
