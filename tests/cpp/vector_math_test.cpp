// Errors of the elementary functions over all binary orders of magnitude, in units of the last place.
#include "vector_math.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "check.h"
#include "core/dtype.h"
#include "cpu/dispatch.h"

namespace {

using namespace pyqe;
using test::VectorMath;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

const VectorMath& vector_math() {
  const std::string isa = cpu::isa();
#if PYQE_X86
  if (isa == "avx2") return test::avx2_math;
  if (isa != "portable") return test::avx512_math;
#endif
  return test::portable_math;
}

// Every 2000th float of [low, high], as many as whole vectors hold.
std::vector<float> sweep(float low, float high) {
  std::vector<float> values;
  const auto add = [&](float from, float to, float sign) {
    for (std::uint32_t bits = bits_of(from); bits <= bits_of(to); bits += 1999) {
      values.push_back(sign * float_from_bits(bits));
    }
  };
  if (low < 0) add(high < 0 ? -high : 0.0f, -low, -1);
  if (high > 0) add(low > 0 ? low : 0.0f, high, 1);
  values.resize(values.size() / 16 * 16);
  return values;
}

using Function = void (*)(const float*, float*, std::int64_t);

double in_ulp(double actual, double expected) {
  const float nearest = std::fabs(static_cast<float>(expected));
  return std::fabs(actual - expected) / (std::nextafter(nearest, kInfinity) - static_cast<double>(nearest));
}

template <class Definition, class Error>
double largest_error(Function function, const Definition& definition, float low, float high,
                     const Error& error) {
  const std::vector<float> x = sweep(low, high);
  std::vector<float> y(x.size());
  function(x.data(), y.data(), static_cast<std::int64_t>(x.size()));
  double worst = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double e = error(y[i], definition(static_cast<double>(x[i])));
    worst = e <= worst ? worst : e;  // NaN becomes the worst and stays it
  }
  return worst;
}

float of(Function function, float x) {
  std::vector<float> values(16, x);
  function(values.data(), values.data(), 16);
  return values[5];
}

}  // namespace

TEST(vector_math_exp) {
  const Function exp = vector_math().exp;
  CHECK(largest_error(exp, [](double x) { return std::exp(x); }, -87.33f, 88.3f, in_ulp) <= 1);
  CHECK(of(exp, -87.4f) < 1.2e-38 && of(exp, -1e30f) == 0 && of(exp, -kInfinity) == 0 && of(exp, 0) == 1);
  CHECK(std::isnan(of(exp, std::nanf(""))));
}

TEST(vector_math_log) {
  const Function log = vector_math().log;
  CHECK(largest_error(log, [](double x) { return std::log(x); }, 1e-45f, 3.4e38f, in_ulp) <= 2);
  CHECK(of(log, 0) == -kInfinity && of(log, kInfinity) == kInfinity && of(log, 1) == 0);
}

TEST(vector_math_sigmoid) {
  const Function sigmoid = vector_math().sigmoid;
  const auto definition = [](double x) { return 1 / (1 + std::exp(-x)); };
  CHECK(largest_error(sigmoid, definition, -87, 3e38f, in_ulp) <= 3);
  CHECK(of(sigmoid, -1e5f) < 1e-38 && of(sigmoid, -kInfinity) < 1e-38 && of(sigmoid, kInfinity) == 1);
  CHECK(std::isnan(of(sigmoid, std::nanf(""))));
}

TEST(vector_math_tanh) {
  const Function tanh = vector_math().tanh;
  const auto absolute = [](double actual, double expected) { return std::fabs(actual - expected); };
  CHECK(largest_error(tanh, [](double x) { return std::tanh(x); }, -3e38f, 3e38f, absolute) <= 2e-7);
  CHECK(of(tanh, -kInfinity) == -1 && of(tanh, kInfinity) == 1 && std::isnan(of(tanh, std::nanf(""))));
}
