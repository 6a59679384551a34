// fake_quant_weights: all layers in one call, per output channel, symmetric; nothing clips.
//   math     scale = max(max |w| / quant_max, 2^-63); out = clamp(rne(w * (1 / scale)), -quant_max, quant_max) * scale
//   traffic  w read (the second read is from cache), out written
//   block    one output channel
//   order    the maximum is exact in any order
#include "channels.h"

namespace dfq {
namespace DFQ_ISA {

namespace {

template <class T, class Out>
void quantize_row(const T* from, Out* to, int64_t n, float quant_max, bool past, float* scale_out) {
  Reader<T> reader;
  Writer<Out> writer(past);
  float least, most;  // a NaN in the row makes its scale and every value NaN, as the reference's maximum does
  extremes_of(from, n, least, most);
  float scale = (-least > most ? -least : most) / quant_max;
  scale = scale < kScaleFloor ? kScaleFloor : scale;
  *scale_out = scale;
  const Vec inv = broadcast(1.0f / scale), factor = broadcast(scale), high = broadcast(quant_max), low = -high;
  const int64_t step = past ? kBlockPastCaches : kBlock;
  for (int64_t start = 0; start < n; start += step) {
    const int64_t count = n - start < step ? n - start : step;
    const T* x = reader.at(from + start, count);
    Out* out = writer.at(to + start, count);
    for (int64_t j = 0; j < count; j += kWidth) {
      store_vec(out + j, clamp(rne(load_vec(x + j) * inv), low, high) * factor);
    }
    writer.done(to + start, count);
  }
}

template <class T, class Out>
void quantize(const FakeQuantWeights& a) {
  int64_t elements = 0;
  for (int64_t layer = 0; layer < a.layers; ++layer) elements += a.channels[layer] * a.sizes[layer];
  const bool past = results_past_caches<Out>(elements, a.threads);
  // rows differ in length, so threads share the elements: a row is the part's in which it begins
  parallel_for(elements, kGrain, a.threads, [&](int64_t begin, int64_t end) {
    int64_t first = 0;  // the layer's first element among all
    for (int64_t layer = 0; layer < a.layers; first += a.channels[layer] * a.sizes[layer], ++layer) {
      const int64_t n = a.sizes[layer];
      const float quant_max = static_cast<float>((1 << (a.bits[layer] - 1)) - 1);
      int64_t channel = begin > first ? (begin - first + n - 1) / n : 0;
      for (; channel < a.channels[layer] && first + channel * n < end; ++channel) {
        const T* from = reinterpret_cast<const T*>(a.weights[layer]) + channel * n;
        Out* to = reinterpret_cast<Out*>(a.outs[layer]) + channel * n;
        quantize_row(from, to, n, quant_max, past, reinterpret_cast<float*>(a.scales[layer]) + channel);
      }
    }
    if (past) written_past_caches();
  });
}

}  // namespace

void fake_quant_weights(const FakeQuantWeights& a) {
  with_type(a.dtype, [&](auto type) {
    with_type(a.out_dtype, [&](auto out) { quantize<decltype(type), decltype(out)>(a); });
  });
}

}  // namespace DFQ_ISA
}  // namespace dfq
