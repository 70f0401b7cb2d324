#include "cpu/dispatch.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

#if PYQE_X86
#include <cpuid.h>
#endif
#if PYQE_X86 && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pyqe::cpu {
namespace {

#if PYQE_X86

// Read from CPUID rather than with __builtin_cpu_supports, whose set of names differs between compilers.
enum Register { kEax, kEbx, kEcx, kEdx };

struct Feature {
  const char* name;
  unsigned leaf, subleaf;
  Register where;
  int bit;
  std::uint64_t state;  // the bits of XCR0 by which the operating system says that it saves the registers
};

constexpr std::uint64_t kAvxState = 0x6, kAvx512State = 0xe6, kAmxState = 0x60000;

constexpr Feature kFeatures[] = {
    {"avx2", 7, 0, kEbx, 5, kAvxState},
    {"fma", 1, 0, kEcx, 12, kAvxState},
    {"f16c", 1, 0, kEcx, 29, kAvxState},
    {"avx512f", 7, 0, kEbx, 16, kAvx512State},
    {"avx512bw", 7, 0, kEbx, 30, kAvx512State},
    {"avx512dq", 7, 0, kEbx, 17, kAvx512State},
    {"avx512vl", 7, 0, kEbx, 31, kAvx512State},
    {"avx512_bf16", 7, 1, kEax, 5, kAvx512State},
    {"avx512_fp16", 7, 0, kEdx, 23, kAvx512State},
    {"amx_tile", 7, 0, kEdx, 24, kAmxState},
    {"amx_bf16", 7, 0, kEdx, 22, kAmxState},
};

std::uint64_t saved_state() {
  unsigned registers[4] = {};
  constexpr unsigned kOsxsave = 1u << 27;
  if (!__get_cpuid(1, &registers[kEax], &registers[kEbx], &registers[kEcx], &registers[kEdx])) return 0;
  if (!(registers[kEcx] & kOsxsave)) return 0;
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return std::uint64_t{high} << 32 | low;
}

std::vector<std::string> detect_features() {
  const std::uint64_t state = saved_state();
  std::vector<std::string> found;
  for (const Feature& feature : kFeatures) {
    unsigned registers[4] = {};
    const bool known = __get_cpuid_count(feature.leaf, feature.subleaf, &registers[kEax], &registers[kEbx],
                                         &registers[kEcx], &registers[kEdx]);
    const bool present = known && (registers[feature.where] >> feature.bit & 1u);
    if (present && (state & feature.state) == feature.state) found.emplace_back(feature.name);
  }
  return found;
}

#else

std::vector<std::string> detect_features() { return {}; }

#endif

#if PYQE_X86

// Linux gives the tile registers to a process that has asked for them; in any other, their first use is
// fatal. Asking again changes nothing, so it does not matter who else does.
bool tiles_granted() {
#ifdef __linux__
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}

#endif

struct Level {
  const char* name;
  std::vector<std::string> needs;
  const Kernels* kernels;
  bool (*granted)();  // what is to be asked of the operating system; null: nothing
};

using Names = std::vector<std::string>;

Names with(Names names, const Names& more) {
  names.insert(names.end(), more.begin(), more.end());
  return names;
}

// Best first.
const std::vector<Level>& levels() {
#if PYQE_X86
  static const Names kAvx2 = {"avx2", "fma", "f16c"};
  static const Names kAvx512 = with(kAvx2, {"avx512f", "avx512bw", "avx512dq", "avx512vl"});
#endif
  static const std::vector<Level> all = {
#if PYQE_X86
      {"amx", with(kAvx512, {"avx512_bf16", "amx_tile", "amx_bf16"}), &amx_kernels, tiles_granted},
      {"avx512_bf16", with(kAvx512, {"avx512_bf16"}), &avx512_bf16_kernels, nullptr},
      {"avx512", kAvx512, &avx512_kernels, nullptr},
      {"avx2", kAvx2, &avx2_kernels, nullptr},
#endif
      {"portable", {}, &portable_kernels, nullptr},
  };
  return all;
}

bool runs_here(const Level& level) {
  static const std::vector<std::string> features = detect_features();
  const bool present = std::all_of(level.needs.begin(), level.needs.end(), [](const std::string& name) {
    return std::find(features.begin(), features.end(), name) != features.end();
  });
  return present && (!level.granted || level.granted());
}

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

const Level& choose() {
  const char* variable = std::getenv("PYQE_CPU_ISA");
  const std::string wanted = variable ? variable : "";
  for (const Level& level : levels()) {
    if ((wanted.empty() || wanted == level.name) && runs_here(level)) return level;
  }
  throw std::invalid_argument(
      "PYQE_CPU_ISA=" + wanted +
      ": expected one of the levels that run on this processor: " + joined(available_isas()));
}

const Level& chosen() {
  static const Level& level = choose();
  return level;
}

}  // namespace

const Kernels& kernels() { return *chosen().kernels; }

std::string isa() { return chosen().name; }

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Level& level : levels()) names.emplace_back(level.name);
  return names;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Level& level : levels()) {
    if (runs_here(level)) names.emplace_back(level.name);
  }
  return names;
}

std::vector<std::string> cpu_features() { return detect_features(); }

}  // namespace pyqe::cpu
