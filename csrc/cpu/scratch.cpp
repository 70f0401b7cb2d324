#include "cpu/scratch.h"

#include <memory>

namespace pyqe::cpu {
namespace {

struct Buffer {
  std::unique_ptr<float[]> memory;
  std::int64_t floats = 0;
};

thread_local Buffer buffer;

}  // namespace

float* scratch(std::int64_t floats) {
  constexpr std::int64_t kLine = 16;  // floats of a cache line
  if (buffer.floats < floats + kLine) {
    buffer.memory.reset();  // before the new one, lest there be both
    buffer.memory.reset(new float[static_cast<std::size_t>(floats + kLine)]);
    buffer.floats = floats + kLine;
  }
  const auto address = reinterpret_cast<std::uintptr_t>(buffer.memory.get());
  return reinterpret_cast<float*>((address + 63) / 64 * 64);
}

}  // namespace pyqe::cpu
