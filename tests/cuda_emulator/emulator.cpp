// The fibers of cuda_runtime.h's emulation.
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cuda_runtime.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace dfq_emulator {

namespace {

constexpr size_t kStack = 128 * 1024;
constexpr size_t kShared = 232448 - 1024;  // bytes of shared memory a block may have on Hopper

enum class State { kReady, kAtBarrier, kAtShuffle, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  dim3 index;
  State state;
  uint32_t value;  // what it offers to its warp
};

std::vector<std::unique_ptr<Fiber>> fibers;
ucontext_t scheduler;
Fiber* current = nullptr;
size_t threads = 0;
const std::function<void()>* kernel_of_block = nullptr;
std::vector<uint32_t> shared_memory;

void enter() {
  (*kernel_of_block)();
  current->state = State::kDone;
  swapcontext(&current->context, &scheduler);
}

void wait(State state) {
  current->state = state;
  swapcontext(&current->context, &scheduler);
}

// Lets everybody go whose partners have arrived. Whoever has returned is not waited for at a barrier, as on the GPU.
bool release() {
  bool moved = false, all = true;
  for (size_t i = 0; i < threads; ++i)
    all = all && (fibers[i]->state == State::kAtBarrier || fibers[i]->state == State::kDone);
  for (size_t i = 0; i < threads && all; ++i)
    if (fibers[i]->state == State::kAtBarrier) fibers[i]->state = State::kReady, moved = true;
  for (size_t warp = 0; warp < threads; warp += 32) {
    bool whole = warp + 32 <= threads;
    for (size_t i = warp; i < warp + 32 && whole; ++i) whole = fibers[i]->state == State::kAtShuffle;
    for (size_t i = warp; i < warp + 32 && whole; ++i) fibers[i]->state = State::kReady, moved = true;
  }
  return moved;
}

void run_block(const dim3& block, const cudaLaunchConfig_t& config) {
  // what shared memory holds at the start is nobody's: a NaN that shows
  blockIdx = block, blockDim = config.blockDim, gridDim = config.gridDim;
  shared_memory.assign(config.dynamicSmemBytes / 4 + 1, 0x7fc0dead);
  for (size_t i = 0; i < threads; ++i) {
    Fiber& fiber = *fibers[i];
    const unsigned width = config.blockDim.x;
    fiber.index = dim3(i % width, i / width, 0);
    fiber.state = State::kReady;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  for (size_t done = 0; done < threads;) {
    bool moved = false;
    for (size_t i = 0; i < threads; ++i) {
      current = fibers[i].get();
      if (current->state != State::kReady) continue;
      threadIdx = current->index;
      swapcontext(&scheduler, &current->context);
      done += current->state == State::kDone;
      moved = true;
    }
    if (!release() && !moved) {
      std::fprintf(stderr, "emulator: threads of a block wait for each other in vain\n");
      std::abort();
    }
  }
}

}  // namespace

void barrier() { wait(State::kAtBarrier); }

namespace {

// What the fiber of number `from` offers; a lane's own is `value`.
uint32_t offered(uint32_t value, size_t from) {
  current->value = value;
  wait(State::kAtShuffle);
  const uint32_t found = fibers[from]->value;
  wait(State::kAtShuffle);
  return found;
}

size_t self() { return threadIdx.x + threadIdx.y * blockDim.x; }

}  // namespace

uint32_t from_lane_below(uint32_t value, int distance) {
  return offered(value, self() % 32 + distance < 32 ? self() + distance : self());
}

uint32_t from_first_lane(uint32_t value) { return offered(value, self() / 32 * 32); }

uint32_t* dynamic_shared() { return shared_memory.data(); }

cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& kernel) {
  threads = static_cast<size_t>(config.blockDim.x) * config.blockDim.y;
  const bool fits = threads > 0 && threads <= 1024 && config.dynamicSmemBytes <= kShared && config.gridDim.x > 0 &&
                    config.gridDim.x < 1u << 31 && config.gridDim.y > 0 && config.gridDim.y < 1u << 16;
  if (!fits) return cudaErrorInvalidConfiguration;
  while (fibers.size() < threads) fibers.emplace_back(new Fiber);
  kernel_of_block = &kernel;
  for (unsigned y = 0; y < config.gridDim.y; ++y)
    for (unsigned x = 0; x < config.gridDim.x; ++x) run_block(dim3(x, y), config);
  return cudaSuccess;
}

}  // namespace dfq_emulator
