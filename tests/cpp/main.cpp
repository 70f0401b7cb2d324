// pyqe_tests [PREFIX]: runs the tests whose name starts with the prefix, on the instruction set that
// PYQE_CPU_ISA names. Exits with 77 where this processor does not have it.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>

#include "check.h"
#include "cpu/dispatch.h"

int main(int count, char** arguments) {
  using namespace pyqe;
  constexpr int kSkipped = 77;
  const std::vector<std::string> isas = cpu::available_isas();
  const char* wanted = std::getenv("PYQE_CPU_ISA");
  if (wanted && std::find(isas.begin(), isas.end(), wanted) == isas.end()) {
    std::printf("%s does not run here\n", wanted);
    return kSkipped;
  }
  const char* prefix = count > 1 ? arguments[1] : "";
  for (const test::Test& test : test::tests()) {
    if (std::strncmp(test.name, prefix, std::strlen(prefix)) != 0) continue;
    const int before = test::failures;
    test.body();
    std::printf("%s %s\n", test::failures == before ? "ok    " : "FAILED", test.name);
  }
  std::printf("%s: %d failed checks\n", cpu::isa().c_str(), test::failures);
  return test::failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
