// Threads: the OpenMP runtime that torch has loaded, never a second pool.
//
// GOMP_parallel is a weak symbol (every OpenMP runtime has it): no OpenMP library is linked, and where none is loaded
// the work runs on the calling thread. So it does in a child of a fork (fork.cpp).
#pragma once
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <sched.h>
#endif

#include <atomic>
#include <climits>
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
//
// Who has waited for some 50 us sleeps until it is woken: another of the team may need this core to get here. sched_yield
// in its place gave the core to any other process, for a whole slice of 3 to 4 ms a barrier. Sleeping earlier costs more
// than the wait: waking takes longer than most steps.
class Barrier {
 public:
  void wait(int team) {
    const int round = round_.load(std::memory_order_acquire);
    if (here_.fetch_add(1, std::memory_order_acq_rel) + 1 == team) {
      here_.store(0, std::memory_order_relaxed);
      round_.store(round + 1);
      if (asleep_.load() > 0) wake();
      return;
    }
    for (int spins = 0; spins < kSpins; spins++)
      if (round_.load(std::memory_order_acquire) != round) return;
    asleep_.fetch_add(1);  // before round_ is read again, as it is written before asleep_ is read: one sees the other
    while (round_.load() == round) sleep(round);
    asleep_.fetch_sub(1);
  }

 private:
  static constexpr int kSpins = 100000;

#ifdef __linux__
  void sleep(int round) { syscall(SYS_futex, &round_, FUTEX_WAIT_PRIVATE, round, nullptr, nullptr, 0); }
  void wake() { syscall(SYS_futex, &round_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0); }
#else
  void sleep(int) { sched_yield(); }
  void wake() {}
#endif

  std::atomic<int> here_{0}, round_{0}, asleep_{0};
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
