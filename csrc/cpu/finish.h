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

// The first `count` bytes or floats, 1 to kWidth. A copy of a length that the compiler does not know is a call.
#if defined(__AVX512BW__) && defined(__AVX512VL__)
DFQ_INLINE inline void store_first(uint8_t* to, Bytes bytes, int64_t count) {
  _mm_mask_storeu_epi8(to, static_cast<__mmask16>(0xFFFFu >> (kWidth - count)), (__m128i)bytes);
}
DFQ_INLINE inline void store_first(float* to, Vec v, int64_t count) {
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>(0xFFFFu >> (kWidth - count)), (__m512)v);
}
#else
DFQ_INLINE inline void store_first(uint8_t* to, Bytes bytes, int64_t count) {
  std::memcpy(to, &bytes, static_cast<size_t>(count));
}
DFQ_INLINE inline void store_first(float* to, Vec v, int64_t count) {
  std::memcpy(to, &v, static_cast<size_t>(count) * sizeof(float));
}
#endif

// A plane of one image, by pixel; inside its frame at negative places too. View2d() is none.
struct View2d {
  const Plane* plane;
  uint8_t* origin;
  int64_t row, pixel;

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

// An activation that is no clamp. Numbers of a clamp are its bounds.
inline bool bends(int activation) { return activation >= kLeakyReLU; }

DFQ_INLINE inline Vec bend(int activation, float a, Vec t) {
  if (activation == kLeakyReLU) return select(t > Vec{}, t, t * a);
  const Vec gate = clamp(t + 3.0f, Vec{}, broadcast(6.0f)) * (1.0f / 6.0f);
  return activation == kHardSwish ? t * gate : gate;
}
DFQ_INLINE inline Vec bend(const Step& s, Vec t) { return bend(s.activation, s.a, t); }

DFQ_INLINE inline Vec activate(const Step& s, Vec t) {
  if (s.activation == kIdentity) return t;
  return bends(s.activation) ? bend(s, t) : clamp(t, broadcast(s.a), broadcast(s.b));
}

// Added to a number of at most 2^21 in magnitude, this leaves no room behind the point: the sum is rounded half to even,
// its lowest bits are the integer, and taking it away again is exact.
constexpr float kToInteger = 12582912.0f;  // 1.5 * 2^23

// One result of a step. Bounds before rounding are bounds after it: they are integers, or what a clamp's bounds become,
// and all of this is monotone. So a clamp costs nothing.
//
// This struct and the next ones leave what is not used as it is: a small network notices the time to clear it.
struct Sink {
  View2d view;
  uint8_t* row;
  float inverse, zero_point, low, high;
  int64_t room;  // 0 where nothing is stored
  uint8_t shift;

  Sink() = default;
  Sink(const Plane& p, uint8_t* arena, const Step& s)
      : view(p, arena), inverse(p.inverse), zero_point(static_cast<float>(p.zero_point)),
        low(static_cast<float>(p.quant_min)), high(static_cast<float>(p.quant_max)), room(p.kept ? p.room : 0),
        shift(static_cast<uint8_t>(p.shift)) {
    if (s.activation == kIdentity || bends(s.activation)) return;
    const float least = low, most = high;
    low = std::min(std::max(s.a * inverse + zero_point, least), most);
    high = std::min(std::max(s.b * inverse + zero_point, least), most);
  }
  // The integer, plus kToInteger.
  DFQ_INLINE Vec round(Vec t) const {
    return clamp(t * inverse + zero_point, broadcast(low), broadcast(high)) + kToInteger;
  }
  DFQ_INLINE Bytes stored(Vec rounded) const {  // q + 128 is q with its highest bit turned
    return lowest_bytes((VecInt)rounded) ^ shift;
  }
  DFQ_INLINE void write(Bytes bytes, int64_t x, int64_t channel) const {
    uint8_t* to = row + x * view.pixel + channel;
    if (channel + kWidth <= room) std::memcpy(to, &bytes, sizeof bytes);
    else if (channel < room) store_first(to, bytes, room - channel);
  }
  DFQ_INLINE Vec put(Vec t, int64_t x, int64_t channel) const {
    const Vec rounded = round(t);
    write(stored(rounded), x, channel);
    return rounded;
  }
};

DFQ_INLINE inline Vec normalize(const Step& s, Vec t, int64_t channel) {
  if (!s.mean.empty())
    t = (t - load_vec(&s.mean[channel])) * load_vec(&s.mult[channel]) + load_vec(&s.bias[channel]);
  return s.slope.empty() ? t : select(t > Vec{}, t, t * load_vec(&s.slope[channel]));
}

// A step's second value: of the same shape, one pixel for all pixels, or one channel for all channels.
struct Other {
  View2d view;
  bool single;

  Other() = default;
  Other(const Program& program, const Step& s, uint8_t* arena) : view(), single(false) {
    if (s.other < 0) return;
    const Plane& p = program.planes[s.other];
    view = View2d(p, arena), single = p.channels == 1 && s.out_channels > 1;
    if (p.height == 1 && p.width == 1) view.row = view.pixel = 0;
  }
  DFQ_INLINE VecInt integers(const uint8_t* row, int64_t x, int64_t channel) const {
    const uint8_t* from = row + x * view.pixel;
    const VecInt stored = single ? VecInt{} + int32_t(*from) : load_bytes(from + channel);
    return stored - view.plane->stored_zero();
  }
};

// float((a - zero_point) * (b - zero_point)) * scale; both sides are below 2^8, so that their product is exact
DFQ_INLINE inline Vec multiplied(const Step& s, Vec a, VecInt b) { return a * __builtin_convertvector(b, Vec) * s.scale; }

// A step that reads a result of the step before out of registers.
struct Chain {
  const Step* step;
  int source, count;
  float scale, zero;  // zero: the zero point as Sink::round gives it
  Other other;
  const uint8_t* other_row;
  Sink outs[kMostOuts];

  // What the step computes of a rounded result, before its activation.
  DFQ_INLINE Vec value(Vec rounded, const uint8_t* row, int64_t x, int64_t channel) const {
    const Vec whole = rounded - zero;
    if (step->kind == kMultiply) return multiplied(*step, whole, other.integers(row, x, channel));
    if (step->kind == kAdd)
      return whole * scale + __builtin_convertvector(other.integers(row, x, channel), Vec) * other.view.plane->scale;
    return normalize(*step, whole * scale, channel);
  }
  DFQ_INLINE void run(Vec rounded, Bytes stored, int64_t x, int64_t channel) const {
    if (step->kind == kTable) {
      for (int i = 0; i < count; ++i) {
        const uint8_t* table = &step->tables[static_cast<size_t>(i * kCodes)];
        Bytes found;
        for (int lane = 0; lane < kWidth; ++lane) found[lane] = table[stored[lane]];
        outs[i].write(found, x, channel);
      }
      return;
    }
    Vec t = value(rounded, other_row, x, channel);
    if (bends(step->activation)) t = bend(*step, t);
    for (int i = 0; i < count; ++i) outs[i].put(t, x, channel);
  }
};

// What ends every step: activation, each result on its grid, and what is chained to it; or its real results.
struct Finish {
  const Step* step;
  int count = 0, chains = 0;
  bool bent;
  Sink outs[kMostOuts];
  Chain chained[kMostChained];
  float *real, *real_row = nullptr;
  int32_t channels, width;

  Finish(const Program& program, const Step& s, uint8_t* arena, float* to)
      : step(&s), bent(bends(s.activation)), real(to), channels(s.out_channels), width(s.out_width) {
    for (int out : s.outs) outs[count++] = Sink(program.planes[out], arena, s);
    for (const Step& next : s.chained) {
      Chain& chain = chained[chains++];
      chain.step = &next, chain.source = chain.count = 0;
      while (s.outs[chain.source] != next.x) ++chain.source;
      chain.scale = program.planes[next.x].scale;
      chain.zero = kToInteger + static_cast<float>(program.planes[next.x].zero_point);
      chain.other = Other(program, next, arena);
      for (int out : next.outs) chain.outs[chain.count++] = Sink(program.planes[out], arena, next);
    }
  }
  void begin_row(int64_t y) {
    real_row = real + y * width * channels;
    for (int i = 0; i < count; ++i) outs[i].row = outs[i].view.at(y, 0);
    for (int c = 0; c < chains; ++c) {
      Chain& chain = chained[c];
      if (chain.other.view.plane) chain.other_row = chain.other.view.at(y, 0);
      for (int i = 0; i < chain.count; ++i) chain.outs[i].row = chain.outs[i].view.at(y, 0);
    }
  }
  DFQ_INLINE void operator()(Vec t, int64_t x, int64_t channel) const {
    if (count == 0) return give_real(activate(*step, t), x, channel);
    if (bent) t = bend(*step, t);
    for (int i = 0; i < count; ++i) {
      const Vec rounded = outs[i].round(t);
      const Bytes stored = outs[i].stored(rounded);
      outs[i].write(stored, x, channel);
      for (int c = 0; c < chains; ++c)
        if (chained[c].source == i) chained[c].run(rounded, stored, x, channel);
    }
  }
  DFQ_INLINE void give_real(Vec t, int64_t x, int64_t channel) const {
    float* to = real_row + x * channels + channel;
    if (channel + kWidth <= channels) store_vec(to, t);
    else store_first(to, t, channels - channel);
  }
};

struct Work {
  const Program& program;
  const Step& step;
  uint8_t* arena;
  const float* image;
  const uint8_t* pixels;  // of the image, where it comes in bytes
  float* real;
  std::atomic<bool>* has_nan;
};

// A row of a step that ends with one stored result: what does not change from pixel to pixel stays in registers.
template <class Values>
DFQ_INLINE inline void one_result(const Finish& finish, int64_t y, int64_t channels, const Values& t_of) {
  const Sink sink = finish.outs[0];
  const bool bent = finish.bent;
  const int activation = finish.step->activation;
  const float a = finish.step->a;
  const int64_t width = finish.width;
  for (int64_t c = 0; c < channels; c += kWidth) {
    const int64_t lanes = sink.room - c;
    uint8_t* to = sink.row + c;
    for (int64_t x = 0; x < width; ++x, to += sink.view.pixel) {
      Vec t = t_of(y, x, c);
      if (bent) t = bend(activation, a, t);
      const Bytes bytes = sink.stored(sink.round(t));
      if (lanes >= kWidth) std::memcpy(to, &bytes, sizeof bytes);
      else store_first(to, bytes, lanes);
    }
  }
}

// t_of(y, x, channel) for every pixel and every kWidth channels of some rows, and its end.
template <class Values>
DFQ_INLINE inline void each_pixel(const Work& w, int64_t begin, int64_t end, int64_t channels, const Values& t_of) {
  Finish finish(w.program, w.step, w.arena, w.real);
  const bool frequent = finish.count == 1 && finish.chains == 0 && finish.outs[0].room > 0;
  for (int64_t y = begin; y < end; ++y) {
    finish.begin_row(y);
    if (frequent) {
      one_result(finish, y, channels, t_of);
      continue;
    }
    for (int64_t x = 0; x < w.step.out_width; ++x)
      for (int64_t c = 0; c < channels; c += kWidth) finish(t_of(y, x, c), x, c);
  }
}

}  // namespace
}  // namespace DFQ_ISA
}  // namespace dfq
