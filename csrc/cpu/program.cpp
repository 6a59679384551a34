// Runs a program: every step over the rows of one image's planes, images shared out to threads.
//
// math    : dfq/engine/graph.py; accumulators int32, then fp32 with every operation rounded on its own
// order   : whole images where there are enough of them (a small network's planes then stay in the first-level cache),
//           else the rows of each step
#include "../common/parallel.h"
#include "convolve.h"
#include "move.h"
#include "steps.h"

namespace dfq {
namespace DFQ_ISA {
namespace {

void run_rows(const Work& w, int64_t begin, int64_t end) {
  switch (w.step.kind) {
    case kQuantize: return quantize(w, begin, end);
    case kConvolve: return convolve(w, begin, end);
    case kRescale: return rescale(w, begin, end);
    case kAdd: return add(w, begin, end);
    case kAveragePool: return average_pool(w, begin, end);
    case kMaxPool: return max_pool(w, begin, end);
    case kTable: return look_up(w, begin, end);
    case kMultiply: return multiply(w, begin, end);
    case kMove: return move(w, begin, end);
    case kResize: return resize(w, begin, end);
    default: __builtin_trap();  // Runner refuses any other
  }
}

// Zero points around a plane; of a slice only its own bytes, for its neighbours may be done already.
void fill_frame(const Plane& p, uint8_t* arena) {
  if ((!p.frame_y && !p.frame_x) || !p.kept) return;
  const auto fill = [&](uint8_t* to, int64_t pixels) {
    const bool whole = p.room == p.stride;
    const int64_t count = whole ? 1 : pixels, bytes = whole ? pixels * p.stride : p.room;
    for (int64_t x = 0; x < count; ++x, to += p.stride) std::memset(to, p.stored_zero(), static_cast<size_t>(bytes));
  };
  uint8_t* frame = arena + p.offset;
  const int64_t row = p.row_bytes(), columns = p.width + 2 * p.frame_x;
  for (int64_t y = 0; y < p.height + 2 * p.frame_y; ++y, frame += row) {
    const bool inside = y >= p.frame_y && y < p.frame_y + p.height;
    fill(frame, inside ? p.frame_x : columns);
    if (inside) fill(frame + row - int64_t(p.frame_x) * p.stride, p.frame_x);
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
  if (s.kind == kMove) return s.runs.empty() ? 2 * outs : outs;
  if (s.kind == kTable && s.chained.empty() && !s.outs.empty()) return outs;
  if (s.kind == kResize) return 24 * outs;
  if (s.kind != kConvolve) return 8 * outs;
  return outs * (s.kernel_y * s.kernel_x * double(program.planes[s.x].channels) / s.groups + 8);
}

// t of every stored byte, of a step whose result depends on nothing else.
bool as_values(const Program& program, Step& s) {
  if (s.kind == kTable) return true;
  if (s.kind != kRescale || !s.mean.empty() || !s.slope.empty()) return false;
  const Plane& in = program.planes[s.x];
  for (int code = 0; code < kCodes; ++code)
    s.values.push_back(static_cast<float>(code - in.stored_zero()) * in.scale);
  return true;
}

// Steps from bytes to bytes, one chained to the other, as tables of the first one's bytes, where 64 are looked up at once.
void join_tables(const Program& program, Step& s) {
  if (!has_vbmi() || s.outs.empty() || !as_values(program, s)) return;
  std::vector<Step> chained = s.chained;
  if (!std::all_of(chained.begin(), chained.end(), [&](Step& next) { return as_values(program, next); })) return;
  s.kind = kTable, s.tables.clear();
  add_tables(program, s, s.values.data(), 1);
  for (Step& next : chained) {
    next.tables.clear();
    add_tables(program, next, next.values.data(), 1);
    const auto source = std::find(s.outs.begin(), s.outs.end(), next.x) - s.outs.begin();
    for (size_t i = 0; i < next.tables.size(); ++i)
      s.tables.push_back(next.tables[i / kCodes * kCodes + s.tables[source * kCodes + i % kCodes]]);
    s.outs.insert(s.outs.end(), next.outs.begin(), next.outs.end());
  }
  s.chained.clear();
}

// False of a step with nothing to do.
bool prepare_step(const Program& program, Step& step) {
  for (Step& next : step.chained) prepare_step(program, next);
  if (step.kind == kMove) return prepare_move(program, step);
  if (step.kind == kConvolve) prepare_convolution(program, step);
  if (step.kind == kTable) add_tables(program, step, step.values.data(), 1);
  if (step.kind == kQuantize && !program.pixel_values.empty())
    add_tables(program, step, program.pixel_values.data(), program.image_channels);
  return true;
}

}  // namespace

void prepare_program(Program& program) {
  const auto idle = [&](Step& step) {
    const bool works = prepare_step(program, step);
    join_tables(program, step);
    return !works;
  };
  program.steps.erase(std::remove_if(program.steps.begin(), program.steps.end(), idle), program.steps.end());
}

void convolve_image(const Program& program, uint8_t* arena, float* out) {
  const Step& step = program.steps[0];
  fill_frame(program.planes[step.x], arena);
  convolve({program, step, arena, nullptr, nullptr, out, nullptr}, 0, step.out_height);
}

void run_program(const ProgramRun& run) {
  const Program& program = *run.program;
  const int64_t pixels = int64_t(program.image_channels) * program.image_height * program.image_width;
  const auto work_on = [&](const Step& step, int64_t index, uint8_t* arena) {
    const int64_t results = int64_t(step.out_height) * step.out_width * step.out_channels;
    float* const real = step.outs.empty() ? run.reals[step.real] + index * results : nullptr;
    const uint8_t* const bytes = run.pixels ? run.pixels + index * pixels : nullptr;
    return Work{program, step, arena, run.pixels ? nullptr : run.images + index * pixels, bytes, real, run.has_nan};
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
