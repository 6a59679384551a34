// fake_quant_weights: all layers in one launch, per output channel, symmetric; nothing clips.
//   math     scale = max(max |w| / quant_max, 2^-63); out = clamp(rne(w * (1 / scale)), -quant_max, quant_max) * scale
//   traffic  w read (the second read is from cache), out written
//   grid     one block per output channel of any layer
//   block    128 threads
//   order    the maximum is exact in any order
#include "declarations.cuh"
#include "sweep.cuh"

namespace dfq {
namespace cuda {

namespace {

constexpr int kLayers = 64;  // of one launch: their addresses travel in its arguments
constexpr int kRowThreads = 128;

struct Rows {
  int layers;
  uint32_t end[kLayers];  // the layer's last row among all rows, plus one
  int64_t size[kLayers];
  const void* weight[kLayers];
  void* out[kLayers];
  float* scale[kLayers];
  float quant_max[kLayers];
};

template <class T, class Out>
__global__ void __launch_bounds__(kRowThreads) quantize_rows(const Rows rows) {
  int layer = 0;
  while (blockIdx.x >= rows.end[layer]) ++layer;
  const uint32_t row = blockIdx.x - (layer ? rows.end[layer - 1] : 0);
  const int64_t n = rows.size[layer];
  const T* from = static_cast<const T*>(rows.weight[layer]) + row * n;
  Out* to = static_cast<Out*>(rows.out[layer]) + row * n;
  Extremes extremes;
  extremes.take(0.0f, 0.0f);
  for (int64_t i = threadIdx.x; i < n; i += kRowThreads) {
    const float w = fabsf(widen(from[i]));
    extremes.take(w, w);
  }
  for (int distance = 16; distance > 0; distance /= 2) extremes.merge(shuffled(extremes, distance));
  __shared__ Extremes warps[kRowThreads / 32];
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = extremes;
  __syncthreads();
  Extremes all = warps[0];
  for (int w = 1; w < kRowThreads / 32; ++w) all.merge(warps[w]);
  const float quant_max = rows.quant_max[layer];
  float scale = all.high / quant_max;
  scale = scale < kScaleFloor ? kScaleFloor : scale;
  const float inv = 1.0f / scale;
  if (threadIdx.x == 0) rows.scale[layer][row] = scale;
  for (int64_t i = threadIdx.x; i < n; i += kRowThreads)
    to[i] = narrow<Out>(clamp(rintf(widen(from[i]) * inv), -quant_max, quant_max) * scale);
}

}  // namespace

void fake_quant_weights(const FakeQuantWeights& a, const Queue& queue) {
  const Launch launch(queue);
  for (int64_t first = 0; first < a.layers; first += kLayers) {
    Rows rows{};
    int64_t total = 0;
    rows.layers = static_cast<int>(at_most(kLayers, a.layers - first));
    for (int i = 0; i < rows.layers; ++i) {
      total += a.channels[first + i];
      if (total >= int64_t(1) << 31) throw std::runtime_error("layers must have fewer than 2^31 channels together");
      rows.end[i] = static_cast<uint32_t>(total);
      rows.size[i] = a.sizes[first + i];
      rows.weight[i] = reinterpret_cast<const void*>(a.weights[first + i]);
      rows.out[i] = reinterpret_cast<void*>(a.outs[first + i]);
      rows.scale[i] = reinterpret_cast<float*>(a.scales[first + i]);
      rows.quant_max[i] = static_cast<float>((1 << (a.bits[first + i] - 1)) - 1);
    }
    with_type(a.dtype, [&](auto type) {
      with_type(a.out_dtype, [&](auto out) {
        run(quantize_rows<decltype(type), decltype(out)>, static_cast<unsigned>(total), kRowThreads, 0, launch, rows);
      });
    });
  }
}

}  // namespace cuda
}  // namespace dfq
