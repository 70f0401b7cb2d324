// Tests that register themselves, and checks that go on after a failure.
#pragma once

#include <cmath>
#include <cstdio>
#include <vector>

namespace pyqe::test {

struct Test {
  const char* name;
  void (*body)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

inline int failures = 0;

inline bool add_test(const char* name, void (*body)()) {
  tests().push_back({name, body});
  return true;
}

inline void check(bool holds, const char* condition, const char* file, int line) {
  if (holds) return;
  ++failures;
  std::printf("%s:%d: %s\n", file, line, condition);
}

// |actual - expected| <= tolerance, or equal; NaN equals NaN.
inline void check_close(double actual, double expected, double tolerance, const char* what, const char* file,
                        int line) {
  const bool equal = actual == expected || (std::isnan(actual) && std::isnan(expected));
  if (equal || std::fabs(actual - expected) <= tolerance) return;
  ++failures;
  std::printf("%s:%d: %s is %.9g, expected %.9g within %.3g\n", file, line, what, actual, expected,
              tolerance);
}

}  // namespace pyqe::test

#define TEST(name)                                                      \
  static void name();                                                   \
  static const bool name##_added = ::pyqe::test::add_test(#name, name); \
  static void name()

#define CHECK(condition) ::pyqe::test::check((condition), #condition, __FILE__, __LINE__)
#define CHECK_CLOSE(actual, expected, tolerance) \
  ::pyqe::test::check_close((actual), (expected), (tolerance), #actual, __FILE__, __LINE__)
