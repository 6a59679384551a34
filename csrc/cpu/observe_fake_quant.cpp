// observe_fake_quant: the batch's range moves the running one, parameters follow, values are fake-quantized.
//   math     as kernels.h's MovingRange and fake_quant
//   traffic  x read for its range, read again (from cache if it fits), out written, one bit per element
//   block    1024 elements
//   order    minimum and maximum are exact in any order; parameters on one thread
#include "channels.h"

namespace dfq {
namespace DFQ_ISA {

namespace {

template <class T>
void observe(const ObserveFakeQuantForward& a) {
  const int64_t blocks = (a.size + kBlock - 1) / kBlock;
  std::vector<float> lows(static_cast<size_t>(blocks)), highs(lows);
  for_blocks(a.size, a.threads, [&](int64_t start, int64_t n) {
    Reader<T> reader;
    const T* x = reader.at(static_cast<const T*>(a.x) + start, n);
    Extremes extremes;
    const int64_t whole = n / kWidth * kWidth;
    for (int64_t j = 0; j < whole; j += kWidth) extremes.add(load_vec(x + j));
    if (whole < n) {  // one of them in place of what is behind the end
      const Vec last = load_vec(x + whole);
      extremes.add(first_lanes(last, broadcast(last[0]), n - whole));
    }
    float least = std::numeric_limits<float>::infinity(), most = -least;
    extremes.fold(least, most);
    lows[static_cast<size_t>(start / kBlock)] = least;
    highs[static_cast<size_t>(start / kBlock)] = most;
  });
  float least = lows[0], most = highs[0];
  for (int64_t b = 1; b < blocks; ++b) {
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
  fake_quant_forward_again({a.dtype, a.threads, view, a.x, a.range.scale, a.range.zero_point, a.range.quant_min,
                            a.range.quant_max, a.out, a.mask});
}

}  // namespace DFQ_ISA
}  // namespace dfq
