// observe_fake_quant: the batch's range moves the running one, parameters follow, values are fake-quantized.
//   math     as kernels.h's MovingRange and fake_quant
//   traffic  x read for its range, read again (from cache if it fits), out written, one bit per element
//   block    32768 elements for the range, 1024 for the values
//   order    minimum and maximum are exact in any order; parameters on one thread
#include "channels.h"
#include "kernels.h"

namespace dfq {
namespace DFQ_ISA {

namespace {

template <class T>
void observe(const ObserveFakeQuantForward& a) {
  const int64_t parts = (a.size + kGrain - 1) / kGrain;
  std::vector<float> lows(static_cast<size_t>(parts)), highs(lows);
  parallel_for(parts, 1, a.threads, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t start = part * kGrain, n = std::min(a.size - start, kGrain);
      extremes_of(static_cast<const T*>(a.x) + start, n, lows[part], highs[part]);
    }
  });
  float least = lows[0], most = highs[0];
  for (int64_t b = 1; b < parts; ++b) {
    if (lows[b] != lows[b]) least = most = lows[b];
    least = lows[b] < least ? lows[b] : least;
    most = highs[b] > most ? highs[b] : most;
  }
  move_range(a.range, least, most);
}

}  // namespace

void observe_fake_quant_forward(const ObserveFakeQuantForward& a) {
  with_type(a.dtype, [&](auto type) { observe<decltype(type)>(a); });
  const View view{a.size, 1, a.size};
  fake_quant_forward({a.dtype, a.threads, view, a.x, a.range.scale, a.range.zero_point, a.range.quant_min,
                      a.range.quant_max, a.out, a.mask});
}

}  // namespace DFQ_ISA
}  // namespace dfq
