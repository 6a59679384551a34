// The steps of a program that multiply no matrices: rounding, tables, sums and products of maps, pools, resizing.
#pragma once
#include "lookup.h"

namespace dfq {
namespace DFQ_ISA {
namespace {

constexpr int64_t kWord = 4;  // bytes

// Images of few channels, and planes whose pixels are a word each: lanes are neighbours of a row, not channels. What is
// behind the channels of a pixel becomes 0; weights are 0 there.
void quantize_words(const Work& w, int64_t begin, int64_t end) {
  const int64_t channels = w.program.image_channels, height = w.program.image_height, width = w.program.image_width;
  Finish finish(w.program, w.step, w.arena, w.real);
  const bool bent = finish.bent;
  const int activation = w.step.activation;
  const float a = w.step.a;
  VecInt nan{};
  for (int i = 0; i < finish.count; ++i) {
    const Sink sink = finish.outs[i];
    for (int64_t y = begin; y < end; ++y) {
      uint8_t* const row = sink.view.at(y, 0);
      for (int64_t x = 0; x < width; x += kWidth) {
        const int64_t lanes = std::min<int64_t>(kWidth, width - x);
        VecInt words{};
        for (int64_t c = channels - 1; c >= 0; --c) {
          const float* from = w.image + (c * height + y) * width + x;
          Vec t{};
          if (lanes == kWidth) t = load_vec(from);
          else std::memcpy(&t, from, static_cast<size_t>(lanes) * sizeof(float));
          nan |= t != t;
          if (bent) t = bend(activation, a, t);
          words = words << 8 | (((VecInt)sink.round(t) & 0xFF) ^ int32_t(sink.shift));
        }
        if (sink.room && lanes == kWidth) std::memcpy(row + x * kWord, &words, sizeof words);
        else if (sink.room) std::memcpy(row + x * kWord, &words, static_cast<size_t>(lanes * kWord));
      }
    }
  }
  for (int i = 0; i < kWidth; ++i)
    if (nan[i]) w.has_nan->store(true);
}

// Whether every stored result has pixels of a word, which are its own.
inline bool in_words(const Work& w) {
  const auto word = [&](int out) {
    const Plane& p = w.program.planes[out];
    return !p.kept || (p.stride == kWord && p.room == kWord);
  };
  return std::all_of(w.step.outs.begin(), w.step.outs.end(), word);
}

// Images in bytes: of every channel, a table for every result.
void quantize_pixels(const Work& w, int64_t begin, int64_t end) {
  const int64_t channels = w.program.image_channels, height = w.program.image_height, width = w.program.image_width;
  const uint8_t* table = w.step.tables.data();
  for (int out : w.step.outs) {
    const Plane& plane = w.program.planes[out];
    const View2d view(plane, w.arena);
    for (int64_t c = 0; c < channels; ++c, table += kCodes)
      for (int64_t y = begin; plane.kept && y < end; ++y) {
        const uint8_t* from = w.pixels + (c * height + y) * width;
        uint8_t* to = view.at(y, 0) + c;
        for (int64_t x = 0; x < width; ++x, to += view.pixel) *to = table[from[x]];
      }
  }
}

void quantize_any(const Work& w, int64_t begin, int64_t end) {
  const int64_t channels = w.program.image_channels, height = w.program.image_height, width = w.program.image_width;
  bool nan = false;
  each_pixel(w, begin, end, channels, [&](int64_t y, int64_t x, int64_t c) {
    Vec t{};
    const int64_t count = std::min<int64_t>(kWidth, channels - c);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t place = ((c + i) * height + y) * width + x;
      t[i] = w.pixels ? w.program.pixel_values[(c + i) * kCodes + w.pixels[place]] : w.image[place];
      nan |= t[i] != t[i];
    }
    return t;
  });
  if (nan) w.has_nan->store(true);
}

void quantize(const Work& w, int64_t begin, int64_t end) {
  const bool alone = w.step.chained.empty() && !w.step.outs.empty();
  if (alone && w.pixels) return quantize_pixels(w, begin, end);
  if (alone && w.program.image_channels <= kWord && in_words(w)) return quantize_words(w, begin, end);
  quantize_any(w, begin, end);
}

void rescale(const Work& w, int64_t begin, int64_t end) {
  const View2d in(w.program.planes[w.step.x], w.arena);
  each_pixel(w, begin, end, w.step.out_channels, [&](int64_t y, int64_t x, int64_t c) DFQ_INLINE {
    return normalize(w.step, real(in, in.at(y, x) + c), c);
  });
}

// Results of their own are looked up as bytes; what else ends a step needs t.
void look_up(const Work& w, int64_t begin, int64_t end) {
  const Step& s = w.step;
  const View2d in(w.program.planes[s.x], w.arena);
  if (!s.outs.empty() && s.chained.empty()) {
    const uint8_t* table = s.tables.data();
    for (int out : s.outs) {
      const Plane& plane = w.program.planes[out];
      const View2d to(plane, w.arena);
      for (int64_t y = begin; plane.kept && y < end; ++y)
        look_up_pixels(table, in.at(y, 0), in.pixel, to.at(y, 0), to.pixel, s.out_width, s.out_channels);
      table += kCodes;
    }
    return;
  }
  each_pixel(w, begin, end, s.out_channels, [&](int64_t y, int64_t x, int64_t c) DFQ_INLINE {
    const uint8_t* from = in.at(y, x) + c;
    Vec t;
    for (int i = 0; i < kWidth; ++i) t[i] = s.values[from[i]];
    return t;
  });
}

void add(const Work& w, int64_t begin, int64_t end) {
  const View2d in(w.program.planes[w.step.x], w.arena);
  const Other other(w.program, w.step, w.arena);
  const float scale = other.view.plane->scale;
  each_pixel(w, begin, end, w.step.out_channels, [&](int64_t y, int64_t x, int64_t c) DFQ_INLINE {
    const VecInt whole = other.integers(other.view.at(y, 0), x, c);
    return normalize(w.step, real(in, in.at(y, x) + c), c) + __builtin_convertvector(whole, Vec) * scale;
  });
}

void multiply(const Work& w, int64_t begin, int64_t end) {
  const View2d in(w.program.planes[w.step.x], w.arena);
  const Other other(w.program, w.step, w.arena);
  each_pixel(w, begin, end, w.step.out_channels, [&](int64_t y, int64_t x, int64_t c) DFQ_INLINE {
    const VecInt whole = load_bytes(in.at(y, x) + c) - in.plane->stored_zero();
    return multiplied(w.step, __builtin_convertvector(whole, Vec), other.integers(other.view.at(y, 0), x, c));
  });
}

void average_pool(const Work& w, int64_t begin, int64_t end) {
  const Step& s = w.step;
  const View2d in(w.program.planes[s.x], w.arena);
  const int32_t *rows = s.windows.data(), *columns = rows + 2 * s.out_height;
  each_pixel(w, begin, end, s.out_channels, [&](int64_t y, int64_t x, int64_t c) DFQ_INLINE {
    VecInt sum{};
    for (int64_t r = rows[2 * y]; r < rows[2 * y + 1]; ++r)
      for (int64_t k = columns[2 * x]; k < columns[2 * x + 1]; ++k)
        sum += load_bytes(in.at(r, k) + c) - in.plane->stored_zero();
    return __builtin_convertvector(sum, Vec) * s.mult[y * s.out_width + x];
  });
}

// Taps of a window along one axis: `count` of them, `step` apart, from `begin` on, all inside the map.
struct Span {
  int64_t begin, step, count;
};

inline Span taps_inside(int64_t begin, int64_t dilation, int64_t kernel, int64_t side) {
  const int64_t first = begin < 0 ? (-begin + dilation - 1) / dilation : 0;
  const int64_t end = std::min(kernel, (side - begin + dilation - 1) / dilation);
  return {begin + first * dilation, dilation, end - first};
}

// The largest bytes of a window, kVectors * kWidth channels of which the first `count` are stored.
template <int kVectors>
DFQ_INLINE inline void largest(const View2d& in, const Span& down, const Span& along, int64_t channel, uint8_t* to,
                               int64_t count) {
  Bytes most[kVectors] = {};
  for (int64_t r = 0; r < down.count; ++r) {
    const uint8_t* from = in.at(down.begin + r * down.step, along.begin) + channel;
    for (int64_t k = 0; k < along.count; ++k, from += along.step * in.pixel)
      for (int v = 0; v < kVectors; ++v) {
        Bytes bytes;
        std::memcpy(&bytes, from + v * kWidth, sizeof bytes);
        most[v] = bytes > most[v] ? bytes : most[v];
      }
  }
  for (int v = 0; v < kVectors; ++v, to += kWidth, count -= kWidth) {
    if (count >= kWidth) std::memcpy(to, &most[v], sizeof most[v]);
    else if (count > 0) store_first(to, most[v], count);
  }
}

void max_pool(const Work& w, int64_t begin, int64_t end) {
  const Step& s = w.step;
  const View2d in(w.program.planes[s.x], w.arena), out(w.program.planes[s.outs[0]], w.arena);
  const int64_t room = out.plane->room;
  const int32_t *rows = s.windows.data(), *columns = rows + 2 * s.out_height;
  const bool adaptive = !s.windows.empty();
  const auto span = [&](const int32_t* windows, int64_t at, int64_t stride, int64_t pad, int64_t dilation, int64_t kernel,
                        int64_t side) {
    if (adaptive) return Span{windows[2 * at], 1, windows[2 * at + 1] - windows[2 * at]};
    return taps_inside(at * stride - pad, dilation, kernel, side);
  };
  for (int64_t y = begin; y < end; ++y) {
    const Span down = span(rows, y, s.stride_y, s.pad_y, s.dilation_y, s.kernel_y, in.plane->height);
    for (int64_t x = 0; x < s.out_width; ++x) {
      const Span along = span(columns, x, s.stride_x, s.pad_x, s.dilation_x, s.kernel_x, in.plane->width);
      uint8_t* to = out.at(y, x);
      int64_t c = 0;
      for (; c + 2 * kWidth < room; c += 4 * kWidth) largest<4>(in, down, along, c, to + c, room - c);
      if (c < room) largest<2>(in, down, along, c, to + c, room - c);
    }
  }
}

// Rows of `windows`: top and bottom, then left and right. Every operation rounds on its own.
void resize(const Work& w, int64_t begin, int64_t end) {
  const Step& s = w.step;
  const View2d in(w.program.planes[s.x], w.arena);
  const int32_t *rows = s.windows.data(), *columns = rows + 2 * s.out_height;
  const float *row_weights = s.weights.data(), *column_weights = row_weights + s.out_height;
  each_pixel(w, begin, end, s.out_channels, [&](int64_t y, int64_t x, int64_t c) DFQ_INLINE {
    const float right = column_weights[x], left = 1.0f - right, bottom = row_weights[y], top = 1.0f - bottom;
    const auto mixed = [&](int64_t row) DFQ_INLINE {
      const VecInt zero = VecInt{} + in.plane->stored_zero();
      const Vec a = __builtin_convertvector(load_bytes(in.at(row, columns[2 * x]) + c) - zero, Vec);
      const Vec b = __builtin_convertvector(load_bytes(in.at(row, columns[2 * x + 1]) + c) - zero, Vec);
      return a * left + b * right;
    };
    return (mixed(rows[2 * y]) * top + mixed(rows[2 * y + 1]) * bottom) * s.scale;
  });
}

}  // namespace
}  // namespace DFQ_ISA
}  // namespace dfq
