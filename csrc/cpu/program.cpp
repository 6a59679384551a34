// Runs a program: every step over the rows of one image's planes, images shared out to threads.
//
// math    : dfq/engine/graph.py; accumulators int32, then fp32 with every operation rounded on its own
// order   : whole images where there are enough of them (a small network's planes then stay in the first-level cache),
//           else the rows of each step
#include "../common/parallel.h"
#include "convolve.h"

namespace dfq {
namespace DFQ_ISA {
namespace {

constexpr int64_t kFewChannels = 4;

// Images of few channels: lanes are neighbours of a row, not channels. What is behind the channels in a pixel stays as it
// is: weights are 0 there.
void quantize_rows(const Work& w, int64_t begin, int64_t end) {
  const int64_t channels = w.program.image_channels, height = w.program.image_height, width = w.program.image_width;
  Finish finish(w.program, w.step, w.arena, w.logits);
  VecInt nan{};
  for (int64_t y = begin; y < end; ++y) {
    finish.begin_row(y);
    for (int64_t x = 0; x < width; x += kWidth)
      for (int64_t c = 0; c < channels; ++c) {
        const float* from = w.image + (c * height + y) * width + x;
        const int64_t lanes = std::min<int64_t>(kWidth, width - x);
        Vec t{};
        if (lanes == kWidth) t = load_vec(from);
        else std::memcpy(&t, from, static_cast<size_t>(lanes) * sizeof(float));
        nan |= t != t;
        for (int i = 0; i < finish.count; ++i) {
          const Sink& sink = finish.outs[i];
          const Bytes bytes = sink.stored(sink.round(t));
          uint8_t* to = sink.row + x * sink.view.pixel + c;
          for (int64_t lane = 0; lane < lanes; ++lane) to[lane * sink.view.pixel] = bytes[lane];
        }
      }
  }
  for (int i = 0; i < kWidth; ++i)
    if (nan[i]) w.has_nan->store(true);
}

void quantize(const Work& w, int64_t begin, int64_t end) {
  const int64_t channels = w.program.image_channels, height = w.program.image_height, width = w.program.image_width;
  bool nan = false;
  each_pixel(w, begin, end, channels, [&](int64_t y, int64_t x, int64_t c) {
    Vec t{};
    const int64_t count = std::min<int64_t>(kWidth, channels - c);
    for (int64_t i = 0; i < count; ++i) {
      t[i] = w.image[((c + i) * height + y) * width + x];
      nan |= t[i] != t[i];
    }
    return t;
  });
  if (nan) w.has_nan->store(true);
}

void rescale(const Work& w, int64_t begin, int64_t end) {
  const View2d in(w.program.planes[w.step.x], w.arena);
  each_pixel(w, begin, end, w.step.out_channels, [&](int64_t y, int64_t x, int64_t c) DFQ_INLINE {
    return normalize(w.step, real(in, in.at(y, x) + c), c);
  });
}

void add(const Work& w, int64_t begin, int64_t end) {
  const View2d in(w.program.planes[w.step.x], w.arena), other(w.program.planes[w.step.other], w.arena);
  each_pixel(w, begin, end, w.step.out_channels, [&](int64_t y, int64_t x, int64_t c) DFQ_INLINE {
    return normalize(w.step, real(in, in.at(y, x) + c), c) + real(other, other.at(y, x) + c);
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

// The first tap of a window that begins at `begin` and is not above or left of the map.
int64_t first_inside(int64_t begin, int64_t dilation) { return begin < 0 ? (-begin + dilation - 1) / dilation : 0; }

void max_pool(const Work& w, int64_t begin, int64_t end) {
  const Step& s = w.step;
  const View2d in(w.program.planes[s.x], w.arena), out(w.program.planes[s.outs[0]], w.arena);
  for (int64_t y = begin; y < end; ++y)
    for (int64_t x = 0; x < s.out_width; ++x) {
      uint8_t* to = out.at(y, x);
      std::memset(to, 0, static_cast<size_t>(out.pixel));
      const int64_t top = y * s.stride_y - s.pad_y, left = x * s.stride_x - s.pad_x;
      for (int64_t r = first_inside(top, s.dilation_y); r < s.kernel_y && top + r * s.dilation_y < in.plane->height; ++r)
        for (int64_t k = first_inside(left, s.dilation_x); k < s.kernel_x && left + k * s.dilation_x < in.plane->width; ++k) {
          const uint8_t* from = in.at(top + r * s.dilation_y, left + k * s.dilation_x);
          for (int64_t c = 0; c < out.pixel; ++c) to[c] = std::max(to[c], from[c]);
        }
    }
}

void run_rows(const Work& w, int64_t begin, int64_t end) {
  switch (w.step.kind) {
    case kQuantize:
      if (w.program.image_channels <= kFewChannels && w.step.chained.empty() && !w.step.outs.empty())
        return quantize_rows(w, begin, end);
      return quantize(w, begin, end);
    case kConvolve: return convolve(w, begin, end);
    case kRescale: return rescale(w, begin, end);
    case kAdd: return add(w, begin, end);
    case kAveragePool: return average_pool(w, begin, end);
    case kMaxPool: return max_pool(w, begin, end);
    default: __builtin_trap();  // Runner refuses any other
  }
}

void fill_frame(const Plane& p, uint8_t* arena) {
  if (!p.frame_y && !p.frame_x) return;
  uint8_t* frame = arena + p.offset;
  const int64_t row = p.row_bytes(), side = int64_t(p.frame_x) * p.stride;
  for (int64_t y = 0; y < p.height + 2 * p.frame_y; ++y) {
    const bool inside = y >= p.frame_y && y < p.frame_y + p.height;
    std::memset(frame + y * row, p.stored_zero(), static_cast<size_t>(inside ? side : row));
    if (inside) std::memset(frame + (y + 1) * row - side, p.stored_zero(), static_cast<size_t>(side));
  }
}

void fill_frames(const Program& program, const Step& step, uint8_t* arena) {
  for (const Step& next : step.chained) fill_frames(program, next, arena);
  for (int index : step.outs) fill_frame(program.planes[index], arena);
}

// copy(the caller's bytes, the plane's, how many) for the runs that an image has on both sides: rows where pixels have no
// gaps, else pixels.
template <class Byte, class Copy>
void each_shared_run(const Plane& p, uint8_t* arena, Byte* image, const Copy& copy) {
  const View2d view(p, arena);
  const bool rows = p.stride == p.channels;
  const int64_t pixels = rows ? p.width : 1, bytes = pixels * p.channels;
  for (int64_t y = 0; y < p.height; ++y)
    for (int64_t x = 0; x < p.width; x += pixels, image += bytes) copy(image, view.at(y, x), bytes);
}

// Signed integers are stored without their sign.
inline void turn_signs(uint8_t* __restrict to, const uint8_t* __restrict from, int64_t bytes, uint8_t turn) {
  for (int64_t i = 0; i < bytes; ++i) to[i] = from[i] ^ turn;
}

void take_inputs(const ProgramRun& run, int64_t index, uint8_t* arena) {
  for (size_t i = 0; i < run.program->inputs.size(); ++i) {
    const Plane& p = run.program->planes[run.program->inputs[i]];
    fill_frame(p, arena);
    const int64_t size = int64_t(p.height) * p.width * p.channels;
    each_shared_run(p, arena, run.inputs[i] + index * size, [&](const uint8_t* from, uint8_t* to, int64_t bytes) {
      turn_signs(to, from, bytes, static_cast<uint8_t>(p.shift));
    });
  }
}

void give_outputs(const ProgramRun& run, int64_t index, uint8_t* arena) {
  for (size_t i = 0; i < run.program->outputs.size(); ++i) {
    const Plane& p = run.program->planes[run.program->outputs[i]];
    const int64_t size = int64_t(p.height) * p.width * p.channels;
    each_shared_run(p, arena, run.outputs[i] + index * size, [&](uint8_t* to, const uint8_t* from, int64_t bytes) {
      turn_signs(to, from, bytes, static_cast<uint8_t>(p.shift));
    });
  }
}

constexpr double kWorthSharing = 3e4;  // products that take longer than a barrier

// Products and other operations of a step, roughly.
double work_of(const Program& program, const Step& s) {
  const double outs = double(s.out_height) * s.out_width * s.out_channels;
  if (s.kind != kConvolve) return 8 * outs;
  return outs * (s.kernel_y * s.kernel_x * double(program.planes[s.x].channels) / s.groups + 8);
}

}  // namespace

void prepare_program(Program& program) {
  for (Step& step : program.steps)
    if (step.kind == kConvolve) prepare_convolution(program, step);
}

void convolve_image(const Program& program, uint8_t* arena, float* out) {
  const Step& step = program.steps[0];
  fill_frame(program.planes[step.x], arena);
  convolve({program, step, arena, nullptr, out, nullptr}, 0, step.out_height);
}

void run_program(const ProgramRun& run) {
  const Program& program = *run.program;
  const int64_t pixels = int64_t(program.image_channels) * program.image_height * program.image_width;
  const int64_t logits = int64_t(program.classes) * program.logit_pixels;
  const auto work_on = [&](const Step& step, int64_t index, uint8_t* arena) {
    return Work{program, step, arena, run.images + index * pixels, run.logits + index * logits, run.has_nan};
  };
  if (run.count >= run.threads) {
    parallel_for(run.threads, 1, run.threads, [&](int64_t begin, int64_t end) {
      for (int64_t slot = begin; slot < end; ++slot)
        for (int64_t index = slot * run.count / run.threads; index < (slot + 1) * run.count / run.threads; ++index) {
          take_inputs(run, index, run.arenas[slot]);
          for (const Step& step : program.steps) {
            fill_frames(program, step, run.arenas[slot]);
            run_rows(work_on(step, index, run.arenas[slot]), 0, step.out_height);
          }
          give_outputs(run, index, run.arenas[slot]);
        }
    });
    return;
  }
  Barrier barrier;
  parallel_team(run.threads, [&](int self, int team) {
    for (int64_t index = 0; index < run.count; ++index) {
      if (self == 0) take_inputs(run, index, run.arenas[0]);
      if (!program.inputs.empty()) barrier.wait(team);
      for (const Step& step : program.steps) {
        const int sharing = work_of(program, step) < kWorthSharing ? 1 : team;  // a barrier costs less than a fork
        if (self == 0) fill_frames(program, step, run.arenas[0]);
        const int64_t rows = step.out_height, begin = self < sharing ? rows * self / sharing : 0;
        const int64_t end = self < sharing ? rows * (self + 1) / sharing : 0;
        if (begin < end) run_rows(work_on(step, index, run.arenas[0]), begin, end);
        barrier.wait(team);
      }
      if (self == 0) give_outputs(run, index, run.arenas[0]);
      if (!program.outputs.empty()) barrier.wait(team);  // nobody writes to what is being taken away
    }
  });
}

}  // namespace DFQ_ISA
}  // namespace dfq
