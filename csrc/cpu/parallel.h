// How work is spread over threads.
#pragma once

#include <cstdint>

namespace pyqe::cpu {

// Calls body(begin, end) on ranges that cover [0, count). `bytes` is what all of it reads and writes.
//
// Either the calling thread does everything or a full team does: libgomp ends the threads that a smaller
// team leaves over and starts them again for the next full one.
template <class Body>
void parallel_for(std::int64_t count, std::int64_t bytes, int threads, const Body& body) {
  // Below this, waking a team costs more than it saves (docs/notes/cpu-token-logits.md).
  constexpr std::int64_t kSerialBytes = 128 * 1024;
#ifdef _OPENMP
  if (threads > 1 && count > 1 && bytes > kSerialBytes) {
    // Several chunks a thread even out a processor that is shared with others.
    const std::int64_t chunks = count < 8 * std::int64_t{threads} ? count : 8 * std::int64_t{threads};
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
      body(count * chunk / chunks, count * (chunk + 1) / chunks);
    }
    return;
  }
#else
  (void)bytes, (void)threads, (void)kSerialBytes;
#endif
  body(std::int64_t{0}, count);
}

}  // namespace pyqe::cpu
