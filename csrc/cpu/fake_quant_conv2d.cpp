// fake_quant_conv2d: the convolution of fake-quantized values by their integers.
//   math     acc = sum of rne(x / x_scale) * rne(weight / weight_scale[c]), int32;
//            out = float(acc) * (x_scale * weight_scale[c]) + bias[c]
//   traffic  x read, out written; one image's integers, and its results where they are halves, stay in the caches
//   block    one image; threads share the images
//   order    sums are exact; fp32 behind them, every operation rounded on its own
#include <cmath>
#include <memory>
#include <mutex>

#include "../common/parallel.h"
#include "elementwise.h"
#include "finish.h"

namespace dfq {
namespace DFQ_ISA {

namespace {

constexpr int64_t kSlack = 64;  // a last vector may read beyond its plane

// The least and the largest of some integers, 0 among them, before they are rounded; and whether one is no number.
struct Extremes {
  Vec low{}, high{};
  VecInt nan{};

  DFQ_INLINE void take(Vec q) {
    low = q < low ? q : low;
    high = q > high ? q : high;
    nan |= q != q;
  }
  void join(const Extremes& other) {
    take(other.low), take(other.high);
    nan |= other.nan;
  }
  float least() const {
    float result = 0;
    for (int i = 0; i < kWidth; ++i) result = std::min(result, low[i]);
    return __builtin_rintf(result);
  }
  float largest() const {
    float result = 0;
    for (int i = 0; i < kWidth; ++i) result = std::max(result, high[i]);
    return __builtin_rintf(result);
  }
  // Whether all are bytes when `zero` is added, and of at most `most` in magnitude.
  bool fit(int32_t zero, float most) const {
    for (int i = 0; i < kWidth; ++i)
      if (nan[i]) return false;
    const auto above = static_cast<float>(zero);
    return least() >= std::max(-above, -most) && largest() <= std::min(255.0f - above, most);
  }
};

// Up to here the integer that is nearest to a product with a scale, rounded to T, is the one that was multiplied.
template <class T>
constexpr float kHeld = 255;  // fp16, unless it underflows: 1023
template <>
constexpr float kHeld<BFloat16> = 127;

// each(q, count, where): the integers of n values, before they are rounded, in vectors; the last has zeros behind `count`.
template <class T, class Each>
DFQ_INLINE inline void each_integer(const T* from, int64_t n, float inverse, bool ahead, const Each& each) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) each(load_ahead(from + i, ahead) * inverse, int64_t(kWidth), i);
  if (i == n) return;
  T rest[kWidth] = {};
  std::memcpy(rest, from + i, (n - i) * sizeof(T));
  each(load_vec(rest) * inverse, n - i, i);
}

// An image into its plane; row: room for the bytes of one of its rows.
template <class T>
Extremes quantize_image(const T* image, float inverse, const Plane& plane, uint8_t* arena, uint8_t* row) {
  const View2d view(plane, arena);
  const int64_t n = int64_t(plane.width) * plane.channels;
  const bool gaps = plane.stride != plane.channels, ahead = reads_ahead();
  const auto zero = static_cast<uint8_t>(plane.zero_point);
  Extremes seen;
  for (int64_t y = 0; y < plane.height; ++y, image += n) {
    uint8_t* to = gaps ? row : view.at(y, 0);
    each_integer(image, n, inverse, ahead, [&](Vec q, int64_t count, int64_t place) DFQ_INLINE {
      seen.take(q);
      const Bytes bytes = lowest_bytes((VecInt)(q + kToInteger)) + zero;
      std::memcpy(to + place, &bytes, static_cast<size_t>(count));
    });
    for (int64_t x = 0; gaps && x < plane.width; ++x)
      for (int64_t c = 0; c < plane.channels; ++c) view.at(y, x)[c] = row[x * plane.channels + c];
  }
  return seen;
}

// The convolution but for its image; false where a weight is no integer of a signed byte or a multiplier is not normal.
bool make_step(const FakeQuantConv2d& a, Step& step) {
  step.kind = kConvolve, step.x = 0;
  step.out_height = a.out_height, step.out_width = a.out_width, step.out_channels = a.out_channels;
  step.kernel_y = a.kernel_y, step.kernel_x = a.kernel_x, step.stride_y = a.stride_y, step.stride_x = a.stride_x;
  step.pad_y = a.pad_y, step.pad_x = a.pad_x, step.dilation_y = a.dilation_y, step.dilation_x = a.dilation_x;
  step.groups = a.groups;
  const int64_t per = int64_t(a.kernel_y) * a.kernel_x * (a.channels / a.groups), room = a.out_channels + kWidth;
  step.weight.resize(static_cast<size_t>(a.out_channels * per));
  step.mult.assign(static_cast<size_t>(room), 0.0f), step.bias.assign(static_cast<size_t>(room), 0.0f);
  std::atomic<bool> fits{true};
  parallel_for(a.out_channels, kGrain / per + 1, a.threads, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      Extremes seen;
      int8_t* to = &step.weight[k * per];
      const float inverse = 1.0f / a.weight_scale[k];
      each_integer(a.weight + k * per, per, inverse, false, [&](Vec q, int64_t count, int64_t place) DFQ_INLINE {
        seen.take(q);
        const Bytes bytes = lowest_bytes((VecInt)(q + kToInteger));
        std::memcpy(to + place, &bytes, static_cast<size_t>(count));
      });
      const float mult = *a.x_scale * a.weight_scale[k];
      if (!seen.fit(128, 128) || !std::isnormal(mult)) fits.store(false);
      step.mult[k] = mult;
      if (a.bias) step.bias[k] = a.bias[k];
    }
  });
  return fits;
}

Program make_program(const FakeQuantConv2d& a, const Step& step, int32_t zero) {
  Plane plane;
  plane.height = a.height, plane.width = a.width, plane.channels = a.channels;
  plane.stride = plane.room = plane.whole_groups();
  plane.frame_y = a.pad_y, plane.frame_x = a.pad_x;
  plane.zero_point = zero;
  Program program;
  program.arena_bytes = plane.bytes() + kSlack;
  program.planes.push_back(plane), program.steps.push_back(step);
  prepare_program(program);
  return program;
}

// fp32 results as halves, `count` of them; to: where those of the first image are.
void narrow(const float* from, int64_t count, int dtype, int64_t image, void* to) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    T* const out = static_cast<T*>(to) + image * count;
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) store_vec(out + i, load_vec(from + i));
    if (i == count) return;
    T rest[kWidth];
    store_vec(rest, load_vec(from + i));
    std::memcpy(out + i, rest, (count - i) * sizeof(T));
  });
}

// zero: what integers are stored above themselves. False where one does not fit.
template <class T>
bool convolve_images(const FakeQuantConv2d& a, const Step& step, int32_t zero) {
  const Program program = make_program(a, step, zero);
  const float inverse = 1.0f / *a.x_scale;
  const int64_t row = int64_t(a.width) * a.channels, in = a.height * row;
  const int64_t size = int64_t(a.out_height) * a.out_width * a.out_channels;
  const bool wide = a.out_dtype == kFloat32;
  const int64_t slots = std::min<int64_t>(a.threads, a.count);
  std::vector<std::unique_ptr<uint8_t[]>> arenas;  // allocated where an exception has somebody to catch it
  std::vector<std::unique_ptr<float[]>> scratch;
  for (int64_t slot = 0; slot < slots; ++slot) {
    arenas.emplace_back(new uint8_t[program.arena_bytes + row]);
    scratch.emplace_back(wide ? nullptr : new float[size + kWidth]);
  }
  std::atomic<bool> fits{true};
  const auto convolve_one = [&](int64_t image, uint8_t* arena, float* real) {
    const T* from = static_cast<const T*>(a.x) + image * in;
    const Extremes seen = quantize_image(from, inverse, program.planes[0], arena, arena + program.arena_bytes);
    if (!seen.fit(zero, kHeld<T>)) return fits.store(false);
    convolve_image(program, arena, wide ? static_cast<float*>(a.out) + image * size : real);
    if (!wide) narrow(real, size, a.out_dtype, image, a.out);
  };
  parallel_for(slots, 1, a.threads, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot)
      for (int64_t image = slot * a.count / slots; image < (slot + 1) * a.count / slots && fits; ++image)
        convolve_one(image, arenas[slot].get(), scratch[slot].get());
  });
  return fits;
}

// Of `count` images.
template <class T>
Extremes extremes_of(const FakeQuantConv2d& a, int64_t count) {
  const T* x = static_cast<const T*>(a.x);
  const float inverse = 1.0f / *a.x_scale;
  const int64_t size = int64_t(a.height) * a.width * a.channels;
  Extremes all;
  std::mutex mutex;
  parallel_for(count, 1, a.threads, [&](int64_t begin, int64_t end) {
    Extremes seen;
    each_integer(x + begin * size, (end - begin) * size, inverse, reads_ahead(),
                 [&](Vec q, int64_t, int64_t) DFQ_INLINE { seen.take(q); });
    const std::lock_guard<std::mutex> lock(mutex);
    all.join(seen);
  });
  return all;
}

}  // namespace

// Most integers have no sign, or fit bytes that have one, and the first image says which. Where it does not (a zero point
// in the middle of a wide range, an image unlike the first) the whole tensor is looked at.
void fake_quant_conv2d(const FakeQuantConv2d& a) {
  Step step;
  *a.fits = false;
  if (!make_step(a, step)) return;
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    const Extremes first = extremes_of<T>(a, 1);
    const int32_t zero = first.least() < 0 ? 128 : 0;
    *a.fits = first.fit(zero, kHeld<T>) && convolve_images<T>(a, step, zero);
    if (*a.fits || std::max(-first.least(), first.largest()) > kHeld<T>) return;
    const Extremes all = extremes_of<T>(a, a.count);
    const auto below = static_cast<int32_t>(std::min(-all.least(), 255.0f));
    *a.fits = all.fit(below, kHeld<T>) && convolve_images<T>(a, step, below);
  });
}

}  // namespace DFQ_ISA
}  // namespace dfq
