// What a tile of accumulators ends with: the scale of every channel, a residual, and what every step ends with.
#pragma once
#include "dot.h"
#include "lookup.h"

namespace dfq {
namespace DFQ_ISA {
namespace {

// acc * mult + bias + residual of kWidth channels
DFQ_INLINE inline Vec scaled(const Step& s, const View2d& residual, VecInt acc, int64_t y, int64_t x, int64_t c) {
  const Vec t = __builtin_convertvector(acc, Vec) * load_vec(&s.mult[c]) + load_vec(&s.bias[c]);
  return residual.plane ? t + real(residual, residual.at(y, x) + c) : t;
}

inline View2d residual_of(const Work& w) {
  return w.step.other < 0 ? View2d() : View2d(w.program.planes[w.step.other], w.arena);
}

constexpr int64_t kRowTile = 64;  // pixels of a tile at most

// What is chained to a tile's end where it is the frequent one.
enum ChainedKind { kNothing, kRescaled, kLookedUp, kSummed, kMultiplied };

// A tile's end where it is the frequent one: one result, at most one step of one result chained to it, all lanes there.
// Everything that does not change from pixel to pixel stays in registers.
template <bool kResidual, ChainedKind kChain>
void finish_lanes(const Step& s, const Finish& finish, const View2d& residual, const int32_t* acc, int64_t acc_step,
                  int pixels, int64_t y, int64_t x, int64_t channel) {
  const Sink sink = finish.outs[0];
  const Chain& chain = finish.chained[0];
  const Sink next = kChain == kNothing ? sink : chain.outs[0];
  const Vec mult = load_vec(&s.mult[channel]), bias = load_vec(&s.bias[channel]);
  const bool bent = finish.bent, next_bent = kChain != kNothing && bends(chain.step->activation);
  const bool normalized = kChain == kRescaled && !chain.step->mean.empty();
  const bool sloped = kChain == kRescaled && !chain.step->slope.empty();
  Vec mean{}, factor{}, shift{}, slope{};
  if (normalized) {
    mean = load_vec(&chain.step->mean[channel]);
    factor = load_vec(&chain.step->mult[channel]), shift = load_vec(&chain.step->bias[channel]);
  }
  if (sloped) slope = load_vec(&chain.step->slope[channel]);
  uint8_t unkept[kRowTile * kWidth];  // a result that is not stored
  const uint8_t* from = kResidual ? residual.at(y, x) + channel : nullptr;
  uint8_t* const first = sink.room ? sink.row + x * sink.view.pixel + channel : unkept;
  uint8_t *to = first, *then = next.row + x * next.view.pixel + channel;
  const int64_t step = sink.room ? sink.view.pixel : kWidth;
  for (int p = 0; p < pixels; ++p, acc += acc_step, to += step) {
    VecInt sum;
    std::memcpy(&sum, acc, sizeof sum);
    Vec t = __builtin_convertvector(sum, Vec) * mult + bias;
    if (kResidual) t = t + real(residual, from), from += residual.pixel;
    if (bent) t = bend(s, t);
    const Vec rounded = sink.round(t);
    const Bytes bytes = sink.stored(rounded);
    std::memcpy(to, &bytes, sizeof bytes);
    if (kChain == kNothing || kChain == kLookedUp) continue;
    if (kChain == kRescaled) {
      t = (rounded - chain.zero) * chain.scale;
      if (normalized) t = (t - mean) * factor + shift;
      if (sloped) t = select(t > Vec{}, t, t * slope);
    } else {
      t = chain.value(rounded, x + p, channel);
    }
    if (next_bent) t = bend(*chain.step, t);
    const Bytes others = next.stored(next.round(t));
    std::memcpy(then, &others, sizeof others);
    then += next.view.pixel;
  }
  if (kChain == kLookedUp)
    look_up_pixels(chain.step->tables.data(), first, step, then, next.view.pixel, pixels, kWidth);
}

using FinishLanes = decltype(&finish_lanes<false, kNothing>);

inline FinishLanes lanes_of(const Finish& finish, bool residual) {
  static const FinishLanes all[2][5] = {
      {finish_lanes<false, kNothing>, finish_lanes<false, kRescaled>, finish_lanes<false, kLookedUp>,
       finish_lanes<false, kSummed>, finish_lanes<false, kMultiplied>},
      {finish_lanes<true, kNothing>, finish_lanes<true, kRescaled>, finish_lanes<true, kLookedUp>,
       finish_lanes<true, kSummed>, finish_lanes<true, kMultiplied>},
  };
  if (finish.chains == 0) return all[residual][kNothing];
  const int kind = finish.chained[0].step->kind;
  return all[residual][kind == kTable ? kLookedUp : kind == kAdd ? kSummed : kind == kMultiply ? kMultiplied : kRescaled];
}

// The same where results are real.
void finish_real_lanes(const Step& s, const Finish& finish, const int32_t* acc, int64_t acc_step, int pixels, int64_t x,
                       int64_t channel) {
  const Vec mult = load_vec(&s.mult[channel]), bias = load_vec(&s.bias[channel]);
  float* to = finish.real_row + x * finish.channels + channel;
  for (int p = 0; p < pixels; ++p, acc += acc_step, to += finish.channels) {
    VecInt sum;
    std::memcpy(&sum, acc, sizeof sum);
    store_vec(to, activate(s, __builtin_convertvector(sum, Vec) * mult + bias));
  }
}

// Whether all of a result's lanes from `channel` on are there.
inline bool has_lanes(const Sink& sink, int64_t channel) { return sink.room == 0 || channel + kWidth <= sink.room; }

void finish_tile(const Work& w, const Finish& finish, const View2d& residual, const int32_t* acc, int pixels, int blocks,
                 int64_t y, int64_t x, int64_t channel, int64_t channels) {
  const int64_t acc_step = int64_t(blocks) * kLanes;
  const bool chained = finish.chains == 1 && finish.chained[0].count == 1;
  const bool simple = finish.count == 1 && (finish.chains == 0 || chained);
  for (int64_t lane = 0; lane < acc_step && lane < channels; lane += kWidth) {
    const int64_t c = channel + lane;
    const bool next_there = !chained || (finish.chained[0].outs[0].room > 0 && has_lanes(finish.chained[0].outs[0], c));
    if (simple && has_lanes(finish.outs[0], c) && next_there) {
      lanes_of(finish, residual.plane)(w.step, finish, residual, acc + lane, acc_step, pixels, y, x, c);
      continue;
    }
    if (finish.count == 0 && !residual.plane && c + kWidth <= finish.channels) {
      finish_real_lanes(w.step, finish, acc + lane, acc_step, pixels, x, c);
      continue;
    }
    for (int p = 0; p < pixels; ++p) {
      VecInt sum;
      std::memcpy(&sum, acc + p * acc_step + lane, sizeof sum);
      finish(scaled(w.step, residual, sum, y, x + p, c), x + p, c);
    }
  }
}

}  // namespace
}  // namespace DFQ_ISA
}  // namespace dfq
