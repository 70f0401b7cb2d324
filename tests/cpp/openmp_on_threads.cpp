// The part of the OpenMP runtime that the library uses, on std::thread.
//
// ThreadSanitizer does not know how libgomp, which is not built with it, makes threads wait for each other.
// In the program that it checks, these functions take the place of libgomp's: the library's code stays as it
// is, and every synchronisation is seen. Their names and arguments are gcc's (The libgomp ABI, in its
// manual).
#include <atomic>
#include <mutex>
#include <thread>
#include <vector>

namespace {

// The threads of a parallel region and the one loop in it.
struct Team {
  std::once_flag started;
  std::atomic<long> next;
  long end, chunk;
};

thread_local Team* team = nullptr;
thread_local int number = 0;
std::mutex critical;

}  // namespace

extern "C" {

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  Team shared;
  const auto run = [&](int thread) {
    team = &shared, number = thread;
    body(data);
    number = 0;
  };
  std::vector<std::thread> members;
  for (unsigned thread = 1; thread < threads; ++thread) members.emplace_back(run, static_cast<int>(thread));
  run(0);
  for (std::thread& member : members) member.join();
}

bool GOMP_loop_dynamic_next(long* start, long* end) {
  // Relaxed: the items of a loop have nothing to say to each other.
  *start = team->next.fetch_add(team->chunk, std::memory_order_relaxed);
  *end = *start + team->chunk < team->end ? *start + team->chunk : team->end;
  return *start < team->end;
}

bool GOMP_loop_dynamic_start(long first, long last, long /*step: 1*/, long chunk, long* start, long* end) {
  std::call_once(team->started, [&] { team->next = first, team->end = last, team->chunk = chunk; });
  return GOMP_loop_dynamic_next(start, end);
}

void GOMP_loop_end_nowait() {}

int omp_get_thread_num() { return number; }

void GOMP_critical_start() { critical.lock(); }

void GOMP_critical_end() { critical.unlock(); }

}  // extern "C"
