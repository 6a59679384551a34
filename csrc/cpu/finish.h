// What every step of a program ends with: activation, rounding to each result's grid, and what is chained to it.
#pragma once
#include <algorithm>

#include "../common/types.h"
#include "kernels.h"
#include "vector.h"

namespace dfq {
namespace DFQ_ISA {
namespace {

typedef uint8_t Bytes __attribute__((vector_size(kWidth)));

// kWidth bytes as integers, and the lowest bytes of kWidth integers. GCC takes a generic conversion apart byte by byte.
#if defined(__AVX512F__)
DFQ_INLINE inline VecInt load_bytes(const uint8_t* from) {
  return (VecInt)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
DFQ_INLINE inline Bytes lowest_bytes(VecInt v) { return (Bytes)_mm512_cvtepi32_epi8((__m512i)v); }
#elif defined(__AVX2__)
DFQ_INLINE inline VecInt load_bytes(const uint8_t* from) {
  return (VecInt)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
}
DFQ_INLINE inline Bytes lowest_bytes(VecInt v) {
  const __m256i place = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                                         -1, -1, -1, -1, 0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i placed = _mm256_shuffle_epi8((__m256i)v, place);
  const __m128i joined = _mm_or_si128(_mm256_castsi256_si128(placed), _mm256_extracti128_si256(placed, 1));
  Bytes bytes;
  _mm_storel_epi64(reinterpret_cast<__m128i*>(&bytes), joined);
  return bytes;
}
#else
DFQ_INLINE inline VecInt load_bytes(const uint8_t* from) {
  VecInt v;
  for (int i = 0; i < kWidth; ++i) v[i] = from[i];
  return v;
}
DFQ_INLINE inline Bytes lowest_bytes(VecInt v) {
  Bytes bytes;
  for (int i = 0; i < kWidth; ++i) bytes[i] = static_cast<uint8_t>(v[i]);
  return bytes;
}
#endif

// A plane of one image, by pixel; inside its frame at negative places too.
struct View2d {
  const Plane* plane = nullptr;
  uint8_t* origin = nullptr;
  int64_t row = 0, pixel = 0;

  View2d() = default;
  View2d(const Plane& p, uint8_t* arena)
      : plane(&p), origin(arena + p.offset + p.frame_y * p.row_bytes() + int64_t(p.frame_x) * p.stride),
        row(p.row_bytes()), pixel(p.stride) {}
  uint8_t* at(int64_t y, int64_t x) const { return origin + y * row + x * pixel; }
};

// (q - zero_point) * scale of kWidth channels
DFQ_INLINE inline Vec real(const View2d& v, const uint8_t* from) {
  const VecInt whole = load_bytes(from) - v.plane->stored_zero();
  return __builtin_convertvector(whole, Vec) * v.plane->scale;
}

DFQ_INLINE inline Vec activate(Vec t, int activation) {
  if (activation == kReLU) return max_keeping_nan(t, Vec{});
  return activation == kReLU6 ? clamp(t, Vec{}, broadcast(6.0f)) : t;
}

// Added to a number of at most 2^21 in magnitude, this leaves no room behind the point: the sum is rounded half to even,
// its lowest bits are the integer, and taking it away again is exact.
constexpr float kToInteger = 12582912.0f;  // 1.5 * 2^23

// One result of a step. Bounds before rounding are bounds after it: they are integers, or what an activation's bound
// becomes, and all of this is monotone. So the activation costs nothing.
struct Sink {
  View2d view;
  uint8_t* row = nullptr;
  float inverse = 1, zero_point = 0, low = 0, high = 0;
  uint8_t shift = 0;

  Sink() = default;
  Sink(const Plane& p, uint8_t* arena, int activation)
      : view(p, arena), inverse(p.inverse), zero_point(static_cast<float>(p.zero_point)),
        low(static_cast<float>(p.quant_min)), high(static_cast<float>(p.quant_max)), shift(static_cast<uint8_t>(p.shift)) {
    if (activation != kIdentity) low = std::max(low, zero_point);
    if (activation == kReLU6) high = std::min(high, 6.0f * inverse + zero_point);
  }
  // The integer, plus kToInteger.
  DFQ_INLINE Vec round(Vec t) const {
    return clamp(t * inverse + zero_point, broadcast(low), broadcast(high)) + kToInteger;
  }
  DFQ_INLINE Bytes stored(Vec rounded) const {  // q + 128 is q with its highest bit turned
    return lowest_bytes((VecInt)rounded) ^ shift;
  }
  DFQ_INLINE Vec put(Vec t, int64_t x, int64_t channel) const {
    const Vec rounded = round(t);
    const Bytes bytes = stored(rounded);
    const int64_t count = std::min<int64_t>(kWidth, view.pixel - channel);
    std::memcpy(row + x * view.pixel + channel, &bytes, static_cast<size_t>(count));
    return rounded;
  }
};

DFQ_INLINE inline Vec normalize(const Step& s, Vec t, int64_t channel) {
  if (s.mean.empty()) return t;
  return (t - load_vec(&s.mean[channel])) * load_vec(&s.mult[channel]) + load_vec(&s.bias[channel]);
}

// A rescale step that reads a result of the step before out of registers.
struct Chain {
  const Step* step = nullptr;
  int source = 0, count = 0;
  float scale = 1, zero = kToInteger;  // zero: the zero point as Sink::round gives it
  Sink outs[kMostOuts];

  DFQ_INLINE Vec real(Vec rounded) const { return (rounded - zero) * scale; }
};

// What ends every step: activation, each result on its grid, and what is chained to it; or the logits.
struct Finish {
  int activation, count = 0, chains = 0;
  Sink outs[kMostOuts];
  Chain chained[kMostChained];
  float *logits, *logit_row = nullptr;
  int32_t classes, width;

  Finish(const Program& program, const Step& step, uint8_t* arena, float* to)
      : activation(step.activation), logits(to), classes(program.classes), width(step.out_width) {
    for (int out : step.outs) outs[count++] = Sink(program.planes[out], arena, activation);
    for (const Step& next : step.chained) {
      Chain& chain = chained[chains++];
      chain.step = &next;
      while (step.outs[chain.source] != next.x) ++chain.source;
      chain.scale = program.planes[next.x].scale;
      chain.zero = kToInteger + static_cast<float>(program.planes[next.x].zero_point);
      for (int out : next.outs) chain.outs[chain.count++] = Sink(program.planes[out], arena, next.activation);
    }
  }
  void begin_row(int64_t y) {
    logit_row = logits + y * width * classes;
    for (int i = 0; i < count; ++i) outs[i].row = outs[i].view.at(y, 0);
    for (int c = 0; c < chains; ++c)
      for (int i = 0; i < chained[c].count; ++i) chained[c].outs[i].row = chained[c].outs[i].view.at(y, 0);
  }
  DFQ_INLINE void operator()(Vec t, int64_t x, int64_t channel) const {
    for (int i = 0; i < count; ++i) {
      const Vec rounded = outs[i].put(t, x, channel);
      for (int c = 0; c < chains; ++c)
        if (chained[c].source == i) run_chain(chained[c], rounded, x, channel);
    }
    if (count || channel >= classes) return;
    t = activate(t, activation);
    const int64_t lanes = std::min<int64_t>(kWidth, classes - channel);
    std::memcpy(logit_row + x * classes + channel, &t, static_cast<size_t>(lanes) * sizeof(float));
  }
  DFQ_INLINE static void run_chain(const Chain& chain, Vec rounded, int64_t x, int64_t channel) {
    const Vec t = normalize(*chain.step, chain.real(rounded), channel);
    for (int i = 0; i < chain.count; ++i) chain.outs[i].put(t, x, channel);
  }
};

struct Work {
  const Program& program;
  const Step& step;
  uint8_t* arena;
  const float* image;
  float* logits;
  std::atomic<bool>* has_nan;
};

// t_of(y, x, channel) for every pixel and every kWidth channels of some rows, and its end.
template <class Values>
DFQ_INLINE inline void each_pixel(const Work& w, int64_t begin, int64_t end, int64_t channels, const Values& t_of) {
  Finish finish(w.program, w.step, w.arena, w.logits);
  for (int64_t y = begin; y < end; ++y) {
    finish.begin_row(y);
    for (int64_t x = 0; x < w.step.out_width; ++x)
      for (int64_t c = 0; c < channels; c += kWidth) finish(t_of(y, x, c), x, c);
  }
}

}  // namespace
}  // namespace DFQ_ISA
}  // namespace dfq
