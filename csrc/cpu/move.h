// Integers to other places: runs of neighbouring channels, channels one by one, or any element to any other.
#pragma once
#include "lookup.h"

namespace dfq {
namespace DFQ_ISA {
namespace {

// Runs of channels where the result's come from, one input after the other.
inline void find_runs(const Program& program, Step& s) {
  std::vector<Run> sources;  // of every input channel: its input and place
  for (size_t i = 0; i < s.sources.size(); ++i)
    for (int32_t c = 0; c < program.planes[s.sources[i]].channels; ++c)
      sources.push_back({static_cast<int32_t>(i), c, 0, 1});
  for (int32_t c = 0; c < s.out_channels; ++c) {
    const int32_t from = s.channels.empty() ? c : s.channels[c];
    Run run = from < 0 ? Run{-1, 0, c, 1} : sources[from];
    run.to = c;
    if (!s.runs.empty()) {
      Run& last = s.runs.back();
      if (last.source == run.source && (run.source < 0 || last.from + last.length == run.from)) {
        ++last.length;
        continue;
      }
    }
    s.runs.push_back(run);
  }
}

// What lies where it belongs already: a producer has written it into its slice.
inline void drop_runs_in_place(const Program& program, Step& s) {
  const Plane& out = program.planes[s.outs[0]];
  const auto in_place = [&](const Run& run) {
    if (run.source < 0) return false;
    const Plane& in = program.planes[s.sources[run.source]];
    return in.offset + run.from == out.offset + run.to && in.stride == out.stride && in.height == out.height &&
           in.width == out.width && in.frame_y == out.frame_y && in.frame_x == out.frame_x;
  };
  s.runs.erase(std::remove_if(s.runs.begin(), s.runs.end(), in_place), s.runs.end());
}

constexpr int64_t kShortRun = 8;  // channels; shorter ones are moved pixel by pixel

inline bool has_short_runs(const Step& s) {
  return int64_t(s.runs.size()) * kShortRun > s.out_channels && s.runs.size() > 2;
}

// Runs as picks: as few as reach all of them, source by source.
inline void find_picks(Step& s) {
  struct Byte {
    int32_t source, from, to;
  };
  constexpr int32_t kReach = 64;
  for (int32_t block = 0; block < s.out_channels; block += kReach) {
    std::vector<Byte> bytes;
    for (const Run& run : s.runs)
      for (int32_t i = 0; i < run.length; ++i)
        if ((run.to + i) / kReach == block / kReach) bytes.push_back({run.source, run.from + i, run.to + i - block});
    std::sort(bytes.begin(), bytes.end(), [](const Byte& a, const Byte& b) {
      return a.source != b.source ? a.source < b.source : a.from < b.from;
    });
    const size_t before = s.picks.size();
    for (const Byte& byte : bytes) {
      const Pick* last = s.picks.size() > before ? &s.picks.back() : nullptr;
      if (!last || last->source != byte.source || byte.from >= last->from + kReach)
        s.picks.push_back({byte.source, byte.from, block, 0, {}});
      Pick& pick = s.picks.back();
      pick.there |= uint64_t(1) << byte.to, pick.codes[byte.to] = static_cast<uint8_t>(byte.from - pick.from);
    }
  }
}

inline void prepare_places(const Program& program, Step& s) {
  const int64_t width = program.planes[s.sources[0]].width;
  for (int32_t pixel : s.pixels)
    s.places.push_back(pixel < 0 ? kNowhere : static_cast<uint32_t>(pixel / width << 16 | pixel % width));
}

// Addresses in the order of the result's bytes.
inline void prepare_addresses(const Program& program, Step& s) {
  std::vector<int64_t> starts;  // elements before each input
  int64_t total = 0;
  for (int source : s.sources) {
    const Plane& p = program.planes[source];
    starts.push_back(total), total += int64_t(p.channels) * p.height * p.width;
  }
  const int64_t pixels = int64_t(s.out_height) * s.out_width;
  s.places.resize(static_cast<size_t>(pixels * s.out_channels), kNowhere);
  for (int64_t c = 0; c < s.out_channels; ++c)
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
      const int64_t from = s.index[c * pixels + pixel];
      if (from < 0) continue;
      const size_t which = std::upper_bound(starts.begin(), starts.end(), from) - starts.begin() - 1;
      const Plane& p = program.planes[s.sources[which]];
      const int64_t place = from - starts[which], area = int64_t(p.height) * p.width;
      const uint8_t* none = nullptr;
      const View2d view(p, nullptr);
      const int64_t address = view.at(place % area / p.width, place % p.width) - none + place / area;
      s.places[pixel * s.out_channels + c] = static_cast<uint32_t>(address);
    }
  std::vector<int32_t>().swap(s.index);  // as large as the result, and of no use any more
}

// False where nothing is left to do.
bool prepare_move(const Program& program, Step& s) {
  if (!s.index.empty()) return prepare_addresses(program, s), true;
  find_runs(program, s);
  if (!s.pixels.empty()) return prepare_places(program, s), true;
  drop_runs_in_place(program, s);
  const bool filled = std::any_of(s.runs.begin(), s.runs.end(), [](const Run& run) { return run.source < 0; });
  if (has_vbmi() && !filled && has_short_runs(s)) find_picks(s);
  return !s.runs.empty();
}

void move_elements(const Work& w, int64_t begin, int64_t end) {
  const Step& s = w.step;
  const View2d out(w.program.planes[s.outs[0]], w.arena);
  const auto fill = static_cast<uint8_t>(s.fill);
  const uint32_t* from = &s.places[begin * s.out_width * s.out_channels];
  for (int64_t y = begin; y < end; ++y)
    for (int64_t x = 0; x < s.out_width; ++x) {
      uint8_t* to = out.at(y, x);
      for (int64_t c = 0; c < s.out_channels; ++c, ++from) to[c] = *from == kNowhere ? fill : w.arena[*from];
    }
}

// One row of a run whose pixels are neighbours on both sides.
inline void copy_row(const Run& run, const uint8_t* from, int64_t from_pixel, uint8_t* to, int64_t to_pixel, int64_t width) {
  const bool whole = run.length == from_pixel && run.length == to_pixel;
  const int64_t pixels = whole ? 1 : width, bytes = whole ? width * run.length : run.length;
  for (int64_t x = 0; x < pixels; ++x, from += from_pixel, to += to_pixel) std::memcpy(to, from, static_cast<size_t>(bytes));
}

void move_runs(const Work& w, int64_t begin, int64_t end) {
  const Step& s = w.step;
  const View2d out(w.program.planes[s.outs[0]], w.arena);
  for (const Run& run : s.runs) {
    const View2d in = run.source < 0 ? View2d() : View2d(w.program.planes[s.sources[run.source]], w.arena);
    for (int64_t y = begin; y < end; ++y) {
      uint8_t* to = out.at(y, 0) + run.to;
      if (in.plane && s.pixels.empty()) {
        copy_row(run, in.at(y, 0) + run.from, in.pixel, to, out.pixel, s.out_width);
        continue;
      }
      for (int64_t x = 0; x < s.out_width; ++x, to += out.pixel) {
        const uint32_t place = s.pixels.empty() ? 0 : s.places[y * s.out_width + x];
        if (in.plane && place != kNowhere)
          std::memcpy(to, in.at(place >> 16, place & 0xFFFF) + run.from, static_cast<size_t>(run.length));
        else std::memset(to, s.fill, static_cast<size_t>(run.length));
      }
    }
  }
}

// Two runs whose channels alternate, as a shuffle of two groups makes them.
inline void interleave(const uint8_t* __restrict a, const uint8_t* __restrict b, uint8_t* __restrict to, int64_t pairs) {
  for (int64_t i = 0; i < pairs; ++i) to[2 * i] = a[i], to[2 * i + 1] = b[i];
}

inline bool alternates(const Step& s) {
  for (size_t i = 0; i < s.runs.size(); ++i) {
    const Run &run = s.runs[i], &first = s.runs[i % 2];
    if (run.source < 0 || run.length != 1 || run.source != first.source || run.from != first.from + int32_t(i / 2)) return false;
  }
  return s.runs.size() % 2 == 0 && int32_t(s.runs.size()) == s.out_channels;
}

// Channels one by one.
void move_channels(const Work& w, int64_t begin, int64_t end) {
  const Step& s = w.step;
  const View2d out(w.program.planes[s.outs[0]], w.arena);
  View2d in[kMostSources];
  const uint8_t* from[kMostSources];
  for (size_t i = 0; i < s.sources.size(); ++i) in[i] = View2d(w.program.planes[s.sources[i]], w.arena);
  const bool pairs = alternates(s);
  for (int64_t y = begin; y < end; ++y)
    for (int64_t x = 0; x < s.out_width; ++x) {
      const uint32_t place = s.pixels.empty() ? static_cast<uint32_t>(y << 16 | x) : s.places[y * s.out_width + x];
      uint8_t* to = out.at(y, x);
      if (place == kNowhere) {
        std::memset(to, s.fill, static_cast<size_t>(s.out_channels));
        continue;
      }
      const int64_t row = place >> 16, column = place & 0xFFFF;
      if (pairs) {
        const Run &a = s.runs[0], &b = s.runs[1];
        interleave(in[a.source].at(row, column) + a.from, in[b.source].at(row, column) + b.from, to, s.out_channels / 2);
        continue;
      }
      for (size_t i = 0; i < s.sources.size(); ++i) from[i] = in[i].at(row, column);
      for (const Run& run : s.runs) {
        if (run.source < 0) std::memset(to + run.to, s.fill, static_cast<size_t>(run.length));
        else if (run.length == 1) to[run.to] = from[run.source][run.from];
        else std::copy_n(from[run.source] + run.from, run.length, to + run.to);
      }
    }
}

// Channels of any order, 64 at once.
void move_picks(const Work& w, int64_t begin, int64_t end) {
  const Step& s = w.step;
  const View2d out(w.program.planes[s.outs[0]], w.arena);
  const uint8_t* from[kMostSources];
  int64_t steps[kMostSources];
  for (int64_t y = begin; y < end; ++y) {
    for (size_t i = 0; i < s.sources.size(); ++i) {
      const View2d in(w.program.planes[s.sources[i]], w.arena);
      from[i] = in.at(y, 0), steps[i] = in.pixel;
    }
    const Pick *first = s.picks.data(), *const end_of_all = first + s.picks.size();
    while (first != end_of_all) {
      const Pick* last = first;
      while (last != end_of_all && last->to == first->to) ++last;
      pick_pixels(first, last, from, steps, out.at(y, 0) + first->to, out.pixel, s.out_width);
      first = last;
    }
  }
}

void move(const Work& w, int64_t begin, int64_t end) {
  const Step& s = w.step;
  if (s.runs.empty()) return move_elements(w, begin, end);
  if (!s.picks.empty()) return move_picks(w, begin, end);
  if (has_short_runs(s)) return move_channels(w, begin, end);
  move_runs(w, begin, end);
}

}  // namespace
}  // namespace DFQ_ISA
}  // namespace dfq
