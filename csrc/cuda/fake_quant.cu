// fake_quant: straight-through fake quantization, with fixed and with learned parameters.
//   math     q = clamp(rne(x * inv + zero_point), quant_min, quant_max); out = (q - zero_point) * scale; inv = 1 / scale
//   traffic  forward: x read, out written, one bit per element; backward: grad and bits read, grad_x written;
//            learned: x and grad read, grad_x written
//   grid     forward, backward: one thread per eight neighbours in memory; learned: sweep.cuh
//   block    256 threads
//   order    every operation rounded on its own; sums as sweep.cuh says
#include "declarations.cuh"
#include "flat.cuh"

namespace dfq {
namespace cuda {

namespace {

// kPerChannel: channels differ; kWhole: all groups are eight elements, 16-byte aligned, the last may be shorter
template <class T, bool kPerChannel, bool kWhole>
__global__ void __launch_bounds__(kThreads)
    quantize(const View view, const T* x, const float* scales, const float* zero_points, Integers integers, T* out,
             uint8_t* mask) {
  const int64_t group = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, at = group * kGroup;
  if (at >= ceil_div(view.size, 16) * 16) return;  // whole pairs of bytes
  const int64_t rest = view.size - at;
  const int count = rest <= 0 ? 0 : rest < kGroup ? static_cast<int>(rest) : kGroup;
  const bool whole = kWhole && count == kGroup;
  float value[kGroup] = {};
  if (whole) load(x + at, value);
  for (int e = 0; e < kGroup && !whole; ++e)
    if (e < count) value[e] = widen(x[at + e]);
  const int64_t row = kPerChannel ? at / view.inner : 0;
  int64_t left = kPerChannel ? view.inner - (at - row * view.inner) : kGroup;
  int64_t c = kPerChannel ? row % view.channels : 0;
  float scale = scales[c], zero_point = zero_points[c], inv = reciprocal(scale);
  unsigned bits = 0;
  const auto one = [&](int e) {
    const float rounded = rintf(value[e] * inv + zero_point);
    const float q = clamp(rounded, integers.low, integers.high);
    bits |= static_cast<unsigned>(q == rounded && e < count) << e;
    value[e] = (q - zero_point) * scale;
  };
  if (left >= kGroup) {  // one channel, as nearly everywhere
    for (int e = 0; e < kGroup; ++e) one(e);
  } else {
    for (int e = 0; e < kGroup; ++e, --left) {
      if (left == 0) {
        c = c + 1 == view.channels ? 0 : c + 1;
        left = view.inner;
        scale = scales[c], zero_point = zero_points[c], inv = reciprocal(scale);
      }
      one(e);
    }
  }
  if (whole) store(out + at, value);
  for (int e = 0; e < kGroup && !whole; ++e)
    if (e < count) out[at + e] = narrow<T>(value[e]);
  if (mask) mask[group] = static_cast<uint8_t>(bits);
}

template <class T, bool kWhole>
__global__ void __launch_bounds__(kThreads) masked(int64_t size, const T* grad_out, const uint8_t* mask, T* grad_x) {
  const int64_t group = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, at = group * kGroup;
  if (at >= size) return;
  const unsigned bits = mask[group];
  if (kWhole && size - at >= kGroup) {
    float grad[kGroup];
    load(grad_out + at, grad);
    for (int e = 0; e < kGroup; ++e) grad[e] = bits >> e & 1 ? grad[e] : 0.0f;
    store(grad_x + at, grad);
    return;
  }
  for (int e = 0; e < kGroup && at + e < size; ++e) grad_x[at + e] = bits >> e & 1 ? grad_out[at + e] : narrow<T>(0.0f);
}

unsigned blocks_of(int64_t size) {
  const int64_t blocks = ceil_div(size, kGroup * kThreads);
  if (blocks >= int64_t(1) << 31) throw std::runtime_error("a tensor must have fewer than 2^42 elements on a GPU");
  return static_cast<unsigned>(blocks);
}

template <class T>
struct Learned : Operator<T, 2, true, Sums<2>> {
  const float *scale, *zero_point;
  Integers integers;

  struct Constants {
    float inv, zero_point;
  };
  __device__ Constants constants(int64_t c, const Layout&) const { return {reciprocal(scale[c]), zero_point[c]}; }

  template <int N>
  __device__ void each(const Constants& k, Sums<2>& sums, const float (&in)[2][N], int n, float (&out)[N]) const {
    for (int e = 0; e < N; ++e) {
      const LearnedGradient g = learned_gradient(in[0][e], in[1][e], k.inv, k.zero_point, integers.low, integers.high);
      out[e] = g.x;
      sums.value[0] += e < n ? g.scale : 0.0f;
      sums.value[1] += e < n ? g.outside : 0.0f;
    }
  }
};

__global__ void finish(const Sums<2>* parts, int slices, int64_t channels, const float* scale, float* grad_scale,
                       float* grad_zero_point) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (c >= channels) return;
  const Sums<2>::Wide total = total_of(parts, slices, channels, c);
  if (threadIdx.x % 32 != 0) return;
  grad_scale[c] = static_cast<float>(total.value[0]);
  grad_zero_point[c] = static_cast<float>(-total.value[1]) * scale[c];
}

}  // namespace

void fake_quant_flat(int dtype, const View& view, const void* x, const float* scale, const float* zero_point,
                     Integers integers, void* out, uint8_t* mask, const Launch& launch) {
  const unsigned blocks = blocks_of(view.size);
  const bool whole = aligned(x) && aligned(out);
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const T* from = static_cast<const T*>(x);
    T* to = static_cast<T*>(out);
    auto* kernel = view.channels > 1 ? (whole ? quantize<T, true, true> : quantize<T, true, false>)
                                     : (whole ? quantize<T, false, true> : quantize<T, false, false>);
    run(kernel, blocks, kThreads, 0, launch, view, from, scale, zero_point, integers, to, mask);
  });
}

void fake_quant_forward(const FakeQuantForward& a, const Queue& queue) {
  const Launch launch(queue);
  fake_quant_flat(a.dtype, a.view, a.x, a.scale, a.zero_point, {a.quant_min, a.quant_max}, a.out, a.mask, launch);
}

void mask_backward(const MaskBackward& a, const Queue& queue) {
  const Launch launch(queue);
  const unsigned blocks = blocks_of(a.size);
  const bool whole = aligned(a.grad_out) && aligned(a.grad_x);
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    auto* kernel = whole ? masked<T, true> : masked<T, false>;
    run(kernel, blocks, kThreads, 0, launch, a.size, static_cast<const T*>(a.grad_out), a.mask,
                                                   static_cast<T*>(a.grad_x));
  });
}

void fake_quant_backward(const FakeQuantBackward& a, const Queue& queue) {
  const Launch launch(queue);
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    Learned<T> op;
    op.in[0] = static_cast<const T*>(a.x);
    op.in[1] = static_cast<const T*>(a.grad_out);
    op.out = static_cast<T*>(a.grad_x);
    op.scale = a.scale, op.zero_point = a.zero_point, op.integers = {a.quant_min, a.quant_max};
    const Layout l = sweep(op, a.view, launch);
    const Sums<2>* parts = parts_in<Sums<2>>(launch.workspace);
    run(finish, static_cast<unsigned>(ceil_div(l.channels, 4)), 128, 0, launch, parts, l.slices, l.channels, a.scale,
        a.grad_scale, a.grad_zero_point);
  });
}

}  // namespace cuda
}  // namespace dfq
