// Runs a program: every step over the rows of one image's planes, images shared out to threads.
//
// math    : dfq/engine/graph.py; accumulators int32, then fp32 with every operation rounded on its own
// order   : whole images where there are enough of them (a small network's planes then stay in the first-level cache),
//           else the rows of each step
#include <algorithm>

#include "../common/parallel.h"
#include "../common/types.h"
#include "dot.h"
#include "kernels.h"

namespace dfq {
namespace DFQ_ISA {
namespace {

typedef uint8_t Bytes __attribute__((vector_size(kWidth)));

DFQ_INLINE inline VecInt load_bytes(const uint8_t* from) {
  Bytes v;
  std::memcpy(&v, from, sizeof v);
  return __builtin_convertvector(v, VecInt);
}

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

DFQ_INLINE inline void store(const Plane& out, Vec t, uint8_t* to, int64_t count) {
  const Vec rounded = rne(t * out.inverse + static_cast<float>(out.zero_point));
  const Vec q = clamp(rounded, broadcast(static_cast<float>(out.quant_min)), broadcast(static_cast<float>(out.quant_max)));
  const Bytes bytes = __builtin_convertvector(__builtin_convertvector(q, VecInt) + out.shift, Bytes);
  if (count >= kWidth) std::memcpy(to, &bytes, sizeof bytes);
  else std::memcpy(to, &bytes, static_cast<size_t>(count));
}

// What ends every step: activation, and each result on its grid; or the logits.
struct Finish {
  int activation, count = 0;
  View2d outs[kMostOuts];
  float* logits;
  int32_t classes;

  Finish(const Program& program, const Step& step, uint8_t* arena, float* to)
      : activation(step.activation), logits(to), classes(program.classes) {
    for (int out : step.outs) outs[count++] = View2d(program.planes[out], arena);
  }
  DFQ_INLINE void operator()(Vec t, int64_t y, int64_t x, int64_t channel) const {
    if (activation == kReLU) t = max_keeping_nan(t, Vec{});
    else if (activation == kReLU6) t = clamp(t, Vec{}, broadcast(6.0f));
    for (int i = 0; i < count; ++i) store(*outs[i].plane, t, outs[i].at(y, x) + channel, outs[i].pixel - channel);
    if (!count && channel < classes)
      std::memcpy(logits + channel, &t, static_cast<size_t>(std::min<int64_t>(kWidth, classes - channel)) * sizeof(float));
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

void quantize(const Work& w, int64_t begin, int64_t end) {
  const Finish finish(w.program, w.step, w.arena, w.logits);
  const int64_t height = w.program.image_height, width = w.program.image_width;
  bool nan = false;
  for (int64_t y = begin; y < end; ++y)
    for (int64_t x = 0; x < width; ++x)
      for (int64_t c = 0; c < w.program.image_channels; c += kWidth) {
        Vec t{};
        const int64_t count = std::min<int64_t>(kWidth, w.program.image_channels - c);
        for (int64_t i = 0; i < count; ++i) {
          t[i] = w.image[((c + i) * height + y) * width + x];
          nan |= t[i] != t[i];
        }
        finish(t, y, x, c);
      }
  if (nan) w.has_nan->store(true);
}

// acc * mult + bias + residual of one tile's pixels and blocks, then its end.
void finish_tile(const Work& w, const Finish& finish, const View2d& residual, const int32_t* acc, int pixels, int blocks,
                 int64_t y, int64_t x, int64_t channel, int64_t channels) {
  for (int p = 0; p < pixels; ++p)
    for (int64_t lane = 0; lane < blocks * kLanes && lane < channels; lane += kWidth) {
      VecInt sum;
      std::memcpy(&sum, acc + int64_t(p) * blocks * kLanes + lane, sizeof sum);
      Vec t = __builtin_convertvector(sum, Vec) * load_vec(&w.step.mult[channel + lane]) +
              load_vec(&w.step.bias[channel + lane]);
      if (residual.plane) t = t + real(residual, residual.at(y, x + p) + channel + lane);
      finish(t, y, x + p, channel + lane);
    }
}

template <int kPixels, int kBlocks>
Dot dot_of() {
#if defined(__AVX512F__)
  if (has_vnni()) return dot4<kPixels, kBlocks>;
#endif
  return dot2<kPixels, kBlocks>;
}

struct Tile {
  int pixels, blocks;
  Dot dot;
};

// The tile that covers `width` pixels of `blocks` blocks with the least work; a last one overlaps the one before.
Tile choose_tile(int64_t width, int64_t blocks) {
#if defined(__AVX512F__)
  static const Tile tiles[] = {
      {16, 1, dot_of<16, 1>()}, {8, 1, dot_of<8, 1>()}, {4, 1, dot_of<4, 1>()}, {1, 1, dot_of<1, 1>()},
      {8, 2, dot_of<8, 2>()},   {4, 2, dot_of<4, 2>()}, {1, 2, dot_of<1, 2>()}, {6, 4, dot_of<6, 4>()},
      {4, 4, dot_of<4, 4>()},   {2, 4, dot_of<2, 4>()}, {1, 4, dot_of<1, 4>()},
  };
#else
  static const Tile tiles[] = {{4, 1, dot_of<4, 1>()}, {2, 1, dot_of<2, 1>()}, {1, 1, dot_of<1, 1>()}};
#endif
  const Tile* best = nullptr;
  double least = 0;
  for (const Tile& tile : tiles) {
    if (tile.pixels > width || tile.blocks > blocks) continue;
    const double count = static_cast<double>((width + tile.pixels - 1) / tile.pixels);
    const double cost = count * (tile.pixels * tile.blocks + tile.pixels + tile.blocks) / tile.blocks;
    if (!best || cost < least) best = &tile, least = cost;
  }
  return *best;
}

void convolve_dense(const Work& w, int64_t begin, int64_t end) {
  const Step& s = w.step;
  const View2d in(w.program.planes[s.x], w.arena);
  const Finish finish(w.program, s, w.arena, w.logits);
  const View2d residual = s.other < 0 ? View2d() : View2d(w.program.planes[s.other], w.arena);
  const int64_t inner = s.groups == 1 ? in.pixel : in.plane->channels / s.groups, outer = s.out_channels / s.groups;
  const int group = has_vnni() ? 4 : 2;
  const Taps taps{s.kernel_y, s.kernel_x, static_cast<int32_t>(inner / group), s.dilation_y * in.row,
                  s.dilation_x * in.pixel, s.stride_x * in.pixel};
  const int64_t block_bytes = int64_t(s.kernel_y) * s.kernel_x * (inner / group) * 64, blocks = (outer + 15) / 16;
  alignas(64) int32_t acc[32 * kLanes];
  for (int64_t g = 0; g < s.groups; ++g)
    for (int64_t b = 0; b < blocks;) {
      const Tile tile = choose_tile(s.out_width, blocks - b);
      const int64_t channel = g * outer + b * kLanes, channels = outer - b * kLanes;
      const uint8_t* weight = &s.packed[(g * blocks + b) * block_bytes];
      const int32_t* start = &s.start[(g * blocks + b) * kLanes];
      for (int64_t y = begin; y < end; ++y)
        for (int64_t next = 0; next < s.out_width; next += tile.pixels) {
          const int64_t x = std::min<int64_t>(next, s.out_width - tile.pixels);
          const uint8_t* from = in.at(y * s.stride_y - s.pad_y, x * s.stride_x - s.pad_x) + g * inner;
          tile.dot(from, taps, weight, block_bytes, start, acc);
          finish_tile(w, finish, residual, acc, tile.pixels, tile.blocks, y, x, channel, channels);
        }
      b += tile.blocks;
    }
}

// One input channel for each output channel: lanes are channels, weights 32-bit [position][channels].
void convolve_depthwise(const Work& w, int64_t begin, int64_t end) {
  const Step& s = w.step;
  const View2d in(w.program.planes[s.x], w.arena);
  const Finish finish(w.program, s, w.arena, w.logits);
  const View2d residual = s.other < 0 ? View2d() : View2d(w.program.planes[s.other], w.arena);
  const int32_t* weight = reinterpret_cast<const int32_t*>(s.packed.data());
  const int64_t padded = (s.out_channels + 15) / 16 * 16;
  for (int64_t y = begin; y < end; ++y)
    for (int64_t x = 0; x < s.out_width; ++x) {
      const uint8_t* from = in.at(y * s.stride_y - s.pad_y, x * s.stride_x - s.pad_x);
      for (int64_t c = 0; c < s.out_channels; c += kWidth) {
        VecInt sum, product;
        std::memcpy(&sum, &s.start[c], sizeof sum);
        for (int64_t r = 0, tap = 0; r < s.kernel_y; ++r)
          for (int64_t k = 0; k < s.kernel_x; ++k, ++tap) {
            std::memcpy(&product, weight + tap * padded + c, sizeof product);
            sum += product * load_bytes(from + r * s.dilation_y * in.row + k * s.dilation_x * in.pixel + c);
          }
        Vec t = __builtin_convertvector(sum, Vec) * load_vec(&s.mult[c]) + load_vec(&s.bias[c]);
        if (residual.plane) t = t + real(residual, residual.at(y, x) + c);
        finish(t, y, x, c);
      }
    }
}

// Groups whose channels fill no register: one output at a time.
void convolve_any(const Work& w, int64_t begin, int64_t end) {
  const Step& s = w.step;
  const View2d in(w.program.planes[s.x], w.arena);
  const Finish finish(w.program, s, w.arena, w.logits);
  const View2d residual = s.other < 0 ? View2d() : View2d(w.program.planes[s.other], w.arena);
  const int64_t inner = in.plane->channels / s.groups, outer = s.out_channels / s.groups;
  for (int64_t y = begin; y < end; ++y)
    for (int64_t x = 0; x < s.out_width; ++x)
      for (int64_t c = 0; c < s.out_channels; c += kWidth) {
        VecInt sum{};
        for (int64_t i = 0; i < kWidth && c + i < s.out_channels; ++i) {
          const int8_t* weight = &s.weight[(c + i) * s.kernel_y * s.kernel_x * inner];
          uint32_t total = 0;
          for (int64_t r = 0; r < s.kernel_y; ++r)
            for (int64_t k = 0; k < s.kernel_x; ++k) {
              const uint8_t* from = in.at(y * s.stride_y - s.pad_y + r * s.dilation_y, x * s.stride_x - s.pad_x + k * s.dilation_x);
              for (int64_t n = 0; n < inner; ++n, ++weight)
                total += static_cast<uint32_t>((from[(c + i) / outer * inner + n] - in.plane->stored_zero()) * *weight);
            }
          sum[i] = static_cast<int32_t>(total);
        }
        Vec t = __builtin_convertvector(sum, Vec) * load_vec(&s.mult[c]) + load_vec(&s.bias[c]);
        if (residual.plane) t = t + real(residual, residual.at(y, x) + c);
        finish(t, y, x, c);
      }
}

void rescale(const Work& w, int64_t begin, int64_t end) {
  const Step& s = w.step;
  const View2d in(w.program.planes[s.x], w.arena);
  const Finish finish(w.program, s, w.arena, w.logits);
  for (int64_t y = begin; y < end; ++y)
    for (int64_t x = 0; x < s.out_width; ++x)
      for (int64_t c = 0; c < s.out_channels; c += kWidth) {
        Vec t = real(in, in.at(y, x) + c);
        if (!s.mean.empty()) t = (t - load_vec(&s.mean[c])) * load_vec(&s.mult[c]) + load_vec(&s.bias[c]);
        finish(t, y, x, c);
      }
}

void add(const Work& w, int64_t begin, int64_t end) {
  const Step& s = w.step;
  const View2d in(w.program.planes[s.x], w.arena), other(w.program.planes[s.other], w.arena);
  const Finish finish(w.program, s, w.arena, w.logits);
  for (int64_t y = begin; y < end; ++y)
    for (int64_t x = 0; x < s.out_width; ++x)
      for (int64_t c = 0; c < s.out_channels; c += kWidth)
        finish(real(in, in.at(y, x) + c) + real(other, other.at(y, x) + c), y, x, c);
}

void average_pool(const Work& w, int64_t begin, int64_t end) {
  const Step& s = w.step;
  const View2d in(w.program.planes[s.x], w.arena);
  const Finish finish(w.program, s, w.arena, w.logits);
  const int32_t *rows = s.windows.data(), *columns = rows + 2 * s.out_height;
  for (int64_t y = begin; y < end; ++y)
    for (int64_t x = 0; x < s.out_width; ++x)
      for (int64_t c = 0; c < s.out_channels; c += kWidth) {
        VecInt sum{};
        for (int64_t r = rows[2 * y]; r < rows[2 * y + 1]; ++r)
          for (int64_t k = columns[2 * x]; k < columns[2 * x + 1]; ++k)
            sum += load_bytes(in.at(r, k) + c) - in.plane->stored_zero();
        finish(__builtin_convertvector(sum, Vec) * s.mult[y * s.out_width + x], y, x, c);
      }
}

void max_pool(const Work& w, int64_t begin, int64_t end) {
  const Step& s = w.step;
  const View2d in(w.program.planes[s.x], w.arena), out(w.program.planes[s.outs[0]], w.arena);
  for (int64_t y = begin; y < end; ++y)
    for (int64_t x = 0; x < s.out_width; ++x) {
      uint8_t* to = out.at(y, x);
      std::memset(to, 0, static_cast<size_t>(out.pixel));
      for (int64_t r = 0; r < s.kernel_y; ++r)
        for (int64_t k = 0; k < s.kernel_x; ++k) {
          const int64_t from_y = y * s.stride_y - s.pad_y + r * s.dilation_y;
          const int64_t from_x = x * s.stride_x - s.pad_x + k * s.dilation_x;
          if (from_y < 0 || from_y >= in.plane->height || from_x < 0 || from_x >= in.plane->width) continue;
          const uint8_t* from = in.at(from_y, from_x);
          for (int64_t c = 0; c < out.pixel; ++c) to[c] = std::max(to[c], from[c]);
        }
    }
}

bool depthwise(const Program& p, const Step& s) {
  return s.groups > 1 && s.groups == s.out_channels && s.groups == p.planes[s.x].channels;
}

bool dense(const Program& p, const Step& s) {
  return s.groups == 1 || p.planes[s.x].channels / s.groups % 4 == 0;
}

void run_rows(const Work& w, int64_t begin, int64_t end) {
  switch (w.step.kind) {
    case kQuantize: return quantize(w, begin, end);
    case kConvolve:
      if (depthwise(w.program, w.step)) return convolve_depthwise(w, begin, end);
      return dense(w.program, w.step) ? convolve_dense(w, begin, end) : convolve_any(w, begin, end);
    case kRescale: return rescale(w, begin, end);
    case kAdd: return add(w, begin, end);
    case kAveragePool: return average_pool(w, begin, end);
    default: return max_pool(w, begin, end);
  }
}

void fill_frames(const Program& program, const Step& step, uint8_t* arena) {
  for (int index : step.outs) {
    const Plane& p = program.planes[index];
    if (!p.frame_y && !p.frame_x) continue;
    uint8_t* frame = arena + p.offset;
    const int64_t row = p.row_bytes(), side = int64_t(p.frame_x) * p.stride;
    for (int64_t y = 0; y < p.height + 2 * p.frame_y; ++y) {
      const bool inside = y >= p.frame_y && y < p.frame_y + p.height;
      std::memset(frame + y * row, p.stored_zero(), static_cast<size_t>(inside ? side : row));
      if (inside) std::memset(frame + (y + 1) * row - side, p.stored_zero(), static_cast<size_t>(side));
    }
  }
}

// Products and other operations of a step, roughly: what is worth a second thread.
double work_of(const Program& program, const Step& s) {
  const double outs = double(s.out_height) * s.out_width * s.out_channels;
  if (s.kind != kConvolve) return 8 * outs;
  return outs * (s.kernel_y * s.kernel_x * double(program.planes[s.x].channels) / s.groups + 8);
}

void pack_depthwise(Step& s) {
  const int64_t padded = (s.out_channels + 15) / 16 * 16, taps = int64_t(s.kernel_y) * s.kernel_x;
  s.packed.assign(static_cast<size_t>(taps * padded * 4), 0);
  for (int64_t c = 0; c < s.out_channels; ++c)
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int32_t value = s.weight[c * taps + tap];
      std::memcpy(&s.packed[(tap * padded + c) * 4], &value, 4);
    }
}

void pack_dense(const Program& program, Step& s) {
  const Plane& in = program.planes[s.x];
  const int64_t given = in.channels / s.groups, inner = s.groups == 1 ? in.stride : given;
  const int64_t outer = s.out_channels / s.groups, blocks = (outer + 15) / 16, taps = int64_t(s.kernel_y) * s.kernel_x;
  const int64_t group = has_vnni() ? 4 : 2, bytes = 4 / group;
  s.packed.assign(static_cast<size_t>(s.groups * blocks * taps * inner * kLanes * bytes), 0);
  for (int64_t k = 0; k < s.out_channels; ++k)
    for (int64_t tap = 0; tap < taps; ++tap)
      for (int64_t c = 0; c < given; ++c) {
        const int64_t block = k / outer * blocks + k % outer / kLanes, lane = k % outer % kLanes;
        const int64_t index = (((block * taps + tap) * (inner / group) + c / group) * kLanes + lane) * group + c % group;
        const int16_t value = s.weight[(k * taps + tap) * given + c];
        std::memcpy(&s.packed[index * bytes], &value, static_cast<size_t>(bytes));  // little-endian
      }
}

}  // namespace

void prepare_program(Program& program) {
  for (Step& s : program.steps) {
    if (s.kind != kConvolve) continue;
    const int64_t outer = s.out_channels / s.groups, blocks = (outer + 15) / 16;
    const int64_t per = static_cast<int64_t>(s.weight.size()) / s.out_channels;
    const bool by_channel = depthwise(program, s);
    s.start.assign(static_cast<size_t>(by_channel ? (s.out_channels + 15) / 16 * 16 : s.groups * blocks * kLanes), 0);
    for (int64_t k = 0; k < s.out_channels; ++k) {
      uint32_t sum = 0;
      for (int64_t i = 0; i < per; ++i) sum += static_cast<uint32_t>(int32_t(s.weight[k * per + i]));
      const int64_t place = by_channel ? k : (k / outer * blocks + k % outer / kLanes) * kLanes + k % outer % kLanes;
      s.start[place] = static_cast<int32_t>(0u - sum * static_cast<uint32_t>(program.planes[s.x].stored_zero()));
    }
    if (by_channel) pack_depthwise(s);
    else if (dense(program, s)) pack_dense(program, s);
  }
}

void run_program(const ProgramRun& run) {
  const Program& program = *run.program;
  const int64_t pixels = int64_t(program.image_channels) * program.image_height * program.image_width;
  const auto one = [&](int64_t index, uint8_t* arena, int threads) {
    for (const Step& step : program.steps) {
      const Work work{program, step, arena, run.images + index * pixels, run.logits + index * program.classes, run.has_nan};
      fill_frames(program, step, arena);
      const double per_row = work_of(program, step) / step.out_height;
      const int64_t grain = std::max<int64_t>(1, static_cast<int64_t>(4e5 / per_row));
      parallel_for(step.out_height, grain, threads, [&](int64_t begin, int64_t end) { run_rows(work, begin, end); });
    }
  };
  if (run.count < run.threads) {
    for (int64_t index = 0; index < run.count; ++index) one(index, run.arenas[0], run.threads);
    return;
  }
  parallel_for(run.threads, 1, run.threads, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot)
      for (int64_t index = slot * run.count / run.threads; index < (slot + 1) * run.count / run.threads; ++index)
        one(index, run.arenas[slot], 1);
  });
}

}  // namespace DFQ_ISA
}  // namespace dfq
