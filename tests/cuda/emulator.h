// The execution model of CUDA on a CPU, for tests: every thread of a block is a fiber, blocks run one after
// the other, and barriers and warp shuffles switch fibers. What the kernels compute, and every address they
// touch, can so be checked where no GPU is.
//
// Fibers run in ascending or, with PYQE_EMULATOR_ORDER=reverse, in descending order from one barrier to the
// next: a kernel that lacks a barrier gives different results in the two.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = void*;

namespace emulator {

constexpr unsigned kWarp = 32;

// Threads that wait for each other: a block, or the lanes of a warp.
struct Barrier {
  unsigned waiting = 0;
  std::uint64_t generation = 0;
};

struct Warp {
  Barrier barrier;
  unsigned present = 0;  // lanes that have not returned
  std::uint64_t slots[kWarp] = {};
};

// A stack and where it stands. Fibers are kept from block to block; between them they switch by setjmp, as
// swapcontext asks the kernel each time.
struct Fiber {
  static constexpr std::size_t kStack = 64 * 1024;
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t start;
  jmp_buf place;
  bool started = false, done = true;
};

// What a thread has started to copy into shared memory: a group to be closed, and the groups that are, oldest
// first.
struct Copies {
  using Group = std::vector<std::function<void()>>;
  Group open;
  std::deque<Group> groups;

  static void run(Group& group) {
    for (const auto& copy : group) copy();
    group.clear();
  }
};

inline bool reverse_order() {
  const char* order = std::getenv("PYQE_EMULATOR_ORDER");
  return order && std::string(order) == "reverse";
}

class Block {
 public:
  Block(unsigned threads, std::size_t shared_bytes, std::function<void()> body)
      : body_(std::move(body)),
        shared_(shared_bytes, 0xff),  // NaN: what was not written shows
        copies_(threads),
        warps_((threads + kWarp - 1) / kWarp),
        present_(threads) {
    while (fibers().size() < threads) fibers().push_back(std::make_unique<Fiber>());
    for (unsigned i = 0; i < threads; ++i) {
      fibers()[i]->done = false;
      warps_[i / kWarp].present += 1;
    }
  }

  void run() {
    current_block = this;
    const unsigned threads = present_;
    const bool reverse = reverse_order();
    while (present_ > 0) {
      const std::uint64_t before = progress_;
      for (unsigned i = 0; i < threads; ++i) resume(reverse ? threads - 1 - i : i);
      if (progress_ == before)
        throw std::logic_error("emulator: threads wait at barriers that others do not reach");
    }
    if (error_) std::rethrow_exception(error_);
  }

  unsigned char* shared() { return shared_.data(); }
  Warp& warp() { return warps_[running_ / kWarp]; }
  unsigned lane() const { return running_ % kWarp; }
  Copies& copies() { return copies_[running_]; }

  void wait(Barrier& barrier, unsigned expected) {
    const std::uint64_t generation = barrier.generation;
    barrier.waiting += 1;
    if (barrier.waiting >= expected) open(barrier);
    while (barrier.generation == generation) yield();
  }

  void wait_for_block() { wait(barrier_, present_); }

  static inline Block* current_block = nullptr;

 private:
  static std::vector<std::unique_ptr<Fiber>>& fibers() {
    static std::vector<std::unique_ptr<Fiber>> all;
    return all;
  }

  static void fiber_main() {
    for (;;) current_block->body();
  }

  void body() {
    try {
      body_();
    } catch (...) {
      error_ = std::current_exception();
    }
    fibers()[running_]->done = true;
    progress_ += 1;
    present_ -= 1;
    warps_[running_ / kWarp].present -= 1;
    if (present_ > 0 && barrier_.waiting == present_) open(barrier_);
    yield();
  }

  void open(Barrier& barrier) {
    barrier.waiting = 0;
    barrier.generation += 1;
    progress_ += 1;
  }

  void resume(unsigned i) {
    Fiber& fiber = *fibers()[i];
    if (fiber.done) return;
    running_ = i;
    threadIdx = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y));
    if (_setjmp(scheduler_) != 0) return;
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = Fiber::kStack;
    makecontext(&fiber.start, &Block::fiber_main, 0);
    setcontext(&fiber.start);
  }

  void yield() {
    Fiber& fiber = *fibers()[running_];
    if (_setjmp(fiber.place) == 0) _longjmp(scheduler_, 1);
  }

  std::function<void()> body_;
  std::vector<unsigned char> shared_;
  std::vector<Copies> copies_;
  std::vector<Warp> warps_;
  jmp_buf scheduler_;
  Barrier barrier_;
  unsigned present_, running_ = 0;
  std::uint64_t progress_ = 0;
  std::exception_ptr error_;
};

inline unsigned lane() { return Block::current_block->lane(); }

// Every lane of the mask leaves a value; then each reads what it wants of the 32.
template <class T, class Read>
auto exchange(unsigned mask, T value, const Read& read) {
  static_assert(sizeof(T) <= sizeof(std::uint64_t));
  Block& block = *Block::current_block;
  Warp& warp = block.warp();
  const unsigned asked = static_cast<unsigned>(__builtin_popcount(mask));
  const unsigned lanes = asked < warp.present ? asked : warp.present;
  std::memcpy(&warp.slots[block.lane()], &value, sizeof value);
  block.wait(warp.barrier, lanes);
  const auto result = read([&](unsigned lane) {
    T found;
    std::memcpy(&found, &warp.slots[lane % kWarp], sizeof found);
    return found;
  });
  block.wait(warp.barrier, lanes);
  return result;
}

template <class T>
T shuffle(unsigned mask, T value, unsigned source) {
  return exchange(mask, value, [&](const auto& of) { return of(source); });
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared,
            Arguments... arguments) {
  gridDim = grid, blockDim = block;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        Block(block.x * block.y * block.z, shared, [&] { kernel(arguments...); }).run();
      }
    }
  }
}

}  // namespace emulator

inline void __syncthreads() { emulator::Block::current_block->wait_for_block(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator::shuffle(mask, 0, 0); }

template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return emulator::shuffle(mask, value, static_cast<unsigned>(lane));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return emulator::shuffle(mask, value, emulator::lane() ^ static_cast<unsigned>(bits));
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int delta) {
  const unsigned source = emulator::lane() + static_cast<unsigned>(delta);
  return emulator::shuffle(mask, value, source < emulator::kWarp ? source : emulator::lane());
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int delta) {
  const unsigned lane = emulator::lane(), by = static_cast<unsigned>(delta);
  return emulator::shuffle(mask, value, lane < by ? lane : lane - by);
}
inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  return emulator::exchange(mask, predicate, [&](const auto& of) {
    unsigned votes = 0;
    for (unsigned lane = 0; lane < emulator::kWarp; ++lane) {
      if ((mask >> lane & 1u) && of(lane)) votes |= 1u << lane;
    }
    return votes;
  });
}
inline bool __any_sync(unsigned mask, bool predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __syncthreads_or(int predicate) {
  static int any;
  __syncthreads();
  any = 0;
  __syncthreads();
  if (predicate) any = 1;
  __syncthreads();
  return any;
}

template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
void __stcs(T* address, T value) {
  *address = value;
}
inline int atomicAdd(int* address, int value) {
  const int before = *address;
  *address += value;
  return before;
}
inline unsigned atomicOr(unsigned* address, unsigned bits) {
  const unsigned before = *address;
  *address |= bits;
  return before;
}
inline unsigned atomicAnd(unsigned* address, unsigned bits) {
  const unsigned before = *address;
  *address &= bits;
  return before;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits ? __builtin_clz(static_cast<unsigned>(bits)) : 32; }
