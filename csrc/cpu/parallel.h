// How work is spread over threads.
#pragma once

#include <cstdint>
#include <exception>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace pyqe::cpu {

// `threads`, or 1 in a process that was forked: libgomp's pool does not come along, and waiting for it never
// ends.
int usable_threads(int threads);

// Calls body(item, thread) for every item of [0, count), thread being a number below `threads`. `bytes` is
// what all of it reads and writes.
//
// Either the calling thread does everything or a full team does: libgomp ends the threads that a smaller
// team leaves over and starts them again for the next full one.
template <class Body>
void parallel_each(std::int64_t count, std::int64_t bytes, int threads, const Body& body) {
  // Below this, waking a team costs more than it saves (docs/notes/cpu-token-logits.md).
  constexpr std::int64_t kSerialBytes = 128 * 1024;
#ifdef _OPENMP
  const int team = usable_threads(threads);
  if (team > 1 && count > 1 && bytes > kSerialBytes) {
    // monotonic: a thread meets items in ascending order, on which ties among candidates rest
    std::exception_ptr failure;  // an exception must not leave the parallel region
#pragma omp parallel for num_threads(team) schedule(monotonic : dynamic)
    for (std::int64_t item = 0; item < count; ++item) {
      try {
        body(item, omp_get_thread_num());
      } catch (...) {
#pragma omp critical
        failure = std::current_exception();
      }
    }
    if (failure) std::rethrow_exception(failure);
    return;
  }
#else
  (void)bytes, (void)threads, (void)kSerialBytes;
#endif
  for (std::int64_t item = 0; item < count; ++item) body(item, 0);
}

// Calls body(begin, end) on ranges that cover [0, count).
template <class Body>
void parallel_for(std::int64_t count, std::int64_t bytes, int threads, const Body& body) {
  // Several chunks a thread even out a processor that is shared with others.
  const std::int64_t chunks = count < 8 * std::int64_t{threads} ? count : 8 * std::int64_t{threads};
  parallel_each(chunks, bytes, threads,
                [&](std::int64_t chunk, int) { body(count * chunk / chunks, count * (chunk + 1) / chunks); });
}

}  // namespace pyqe::cpu
