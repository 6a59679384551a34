// A forked process has one thread: OpenMP's others stay with the parent, and a team that waited for them would wait for
// ever. Whoever is a child of a fork works alone.
#include <pthread.h>

#include "common/parallel.h"

namespace dfq {

namespace {

bool forked = false;
const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

bool works_alone() { return forked || registered != 0; }

}  // namespace dfq
