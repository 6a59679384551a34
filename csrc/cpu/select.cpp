// Which instruction-set level this processor runs. Compiled for the oldest one.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace dfq {

#if defined(__x86_64__)
namespace baseline {
extern const CpuKernels table;
}
namespace v2 {
extern const CpuKernels table;
}
namespace v3 {
extern const CpuKernels table;
}
namespace v4 {
extern const CpuKernels table;
}

static const CpuKernels& choose() {
  __builtin_cpu_init();
  const bool v2_there = __builtin_cpu_supports("sse4.1") && __builtin_cpu_supports("sse4.2") &&
                        __builtin_cpu_supports("ssse3") && __builtin_cpu_supports("popcnt");
  const bool v3_there = v2_there && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool v4_there = v3_there && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
  const char* limit = std::getenv("DFQ_CPU");  // a lower level than the processor has, for tests
  const auto allowed = [&](const char* level) { return !limit || std::strcmp(level, limit) <= 0; };
  if (v4_there && allowed("v4")) return v4::table;
  if (v3_there && allowed("v3")) return v3::table;
  if (v2_there && allowed("v2")) return v2::table;
  return baseline::table;
}
#else
namespace baseline {
extern const CpuKernels table;
}
static const CpuKernels& choose() { return baseline::table; }
#endif

const CpuKernels& cpu_kernels() {
  static const CpuKernels& chosen = choose();
  return chosen;
}

}  // namespace dfq
