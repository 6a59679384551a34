// Threads: the OpenMP runtime that torch has loaded, never a second pool.
//
// GOMP_parallel is a weak symbol (every OpenMP runtime has it): no OpenMP library is linked, and where none is loaded
// the work runs on the calling thread. So it does in a child of a fork (fork.cpp).
#pragma once
#include <sched.h>

#include <atomic>
#include <cstdint>

extern "C" {
void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned) __attribute__((weak));
int omp_get_thread_num(void) __attribute__((weak));
int omp_get_num_threads(void) __attribute__((weak));
}

namespace dfq {

bool works_alone();  // fork.cpp

// Calls task(begin, end) so that [0, count) is covered, each thread one contiguous part of at least `grain`.
template <class Task>
static void parallel_for(int64_t count, int64_t grain, int threads, const Task& task) {
  int64_t parts = (count + grain - 1) / (grain > 0 ? grain : 1);
  if (parts > threads) parts = threads;
  if (parts <= 1 || works_alone() || !GOMP_parallel || !omp_get_thread_num || !omp_get_num_threads) {
    if (count > 0) task(int64_t(0), count);
    return;
  }
  struct Shared {
    const Task* task;
    int64_t count;
  } shared{&task, count};
  GOMP_parallel(
      [](void* raw) {
        const Shared& s = *static_cast<const Shared*>(raw);
        const int64_t team = omp_get_num_threads(), self = omp_get_thread_num();
        const int64_t begin = s.count * self / team, end = s.count * (self + 1) / team;
        if (begin < end) (*s.task)(begin, end);
      },
      &shared, static_cast<unsigned>(parts), 0);
}

// Waits until all of a team are here; for teams whose members run at once.
class Barrier {
 public:
  void wait(int team) {
    const int round = round_.load(std::memory_order_acquire);
    if (here_.fetch_add(1, std::memory_order_acq_rel) + 1 == team) {
      here_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round;)
      if (++spins > 4000) sched_yield();  // somebody else may need this core to get here
  }

 private:
  std::atomic<int> here_{0}, round_{0};
};

// Calls task(self, team) on at most `threads` threads at once; team is how many there are.
template <class Task>
static void parallel_team(int threads, const Task& task) {
  if (threads <= 1 || works_alone() || !GOMP_parallel || !omp_get_thread_num || !omp_get_num_threads) {
    task(0, 1);
    return;
  }
  GOMP_parallel(
      [](void* raw) { (*static_cast<const Task*>(raw))(omp_get_thread_num(), omp_get_num_threads()); },
      const_cast<void*>(static_cast<const void*>(&task)), static_cast<unsigned>(threads), 0);
}

}  // namespace dfq
