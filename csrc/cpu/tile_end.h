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

constexpr int64_t kRowTile = 64;  // pixels that end together at most

DFQ_INLINE inline void store_lanes(uint8_t* to, Bytes bytes, bool whole, int64_t lanes) {
  if (whole) std::memcpy(to, &bytes, sizeof bytes);
  else store_first(to, bytes, lanes);
}

// What is chained to a tile's end where it is the frequent one.
enum ChainedKind { kNothing, kRescaled, kLookedUp, kSummed, kMultiplied };

// The end of neighbouring pixels, row after row, where it is the frequent one: one result, at most one step of one result
// chained to it. Everything that does not change from pixel to pixel stays in registers. kBent: an activation is no clamp,
// or has slopes; lanes: how many of kWidth are stored.
template <bool kResidual, ChainedKind kChain, bool kBent>
void finish_lanes(const Step& s, const Finish& finish, const View2d& residual, const int32_t* acc, int64_t acc_step,
                  int64_t pixels, int64_t y, int64_t x, int64_t channel, int64_t lanes) {
  const Sink sink = finish.outs[0];
  const Chain& chain = finish.chained[0];
  const Sink next = kChain == kNothing ? sink : chain.outs[0];
  const Vec mult = load_vec(&s.mult[channel]), bias = load_vec(&s.bias[channel]);
  const bool whole = lanes == kWidth, bent = kBent && finish.bent;
  const bool next_bent = kBent && kChain != kNothing && bends(chain.step->activation);
  const int activation = s.activation, next_activation = next_bent ? chain.step->activation : kIdentity;
  const float bend_a = s.a, next_a = next_bent ? chain.step->a : 0;
  const bool normalized = kChain == kRescaled && !chain.step->mean.empty();
  const bool sloped = kBent && kChain == kRescaled && !chain.step->slope.empty();
  const float zero = chain.zero, scale = chain.scale;
  const VecInt residual_zero = kResidual ? VecInt{} + residual.plane->stored_zero() : VecInt{};
  const float residual_scale = kResidual ? residual.plane->scale : 0;
  Vec mean{}, factor{}, shift{}, slope{};
  if (normalized) {
    mean = load_vec(&chain.step->mean[channel]);
    factor = load_vec(&chain.step->mult[channel]), shift = load_vec(&chain.step->bias[channel]);
  }
  if (sloped) slope = load_vec(&chain.step->slope[channel]);
  uint8_t unkept[kRowTile * kWidth];  // a result that is not stored
  for (int64_t count; pixels > 0; pixels -= count, ++y, x = 0) {
    count = std::min(pixels, finish.width - x);
    const uint8_t* from = kResidual ? residual.at(y, x) + channel : nullptr;
    uint8_t* const first = sink.room ? sink.view.at(y, x) + channel : unkept;
    uint8_t *to = first, *then = next.view.at(y, x) + channel;
    const int64_t step = sink.room ? sink.view.pixel : kWidth;
    const uint8_t* const other_row = kChain == kSummed || kChain == kMultiplied ? chain.other.view.at(y, 0) : nullptr;
    for (int64_t p = 0; p < count; ++p, acc += acc_step, to += step) {
      VecInt sum;
      std::memcpy(&sum, acc, sizeof sum);
      Vec t = __builtin_convertvector(sum, Vec) * mult + bias;
      if (kResidual) {
        t = t + __builtin_convertvector(load_bytes(from) - residual_zero, Vec) * residual_scale;
        from += residual.pixel;
      }
      if (bent) t = bend(activation, bend_a, t);
      const Vec rounded = sink.round(t);
      store_lanes(to, sink.stored(rounded), whole, lanes);
      if (kChain == kNothing || kChain == kLookedUp) continue;
      if (kChain == kRescaled) {
        t = (rounded - zero) * scale;
        if (normalized) t = (t - mean) * factor + shift;
        if (sloped) t = select(t > Vec{}, t, t * slope);
      } else {
        t = chain.value(rounded, other_row, x + p, channel);
      }
      if (next_bent) t = bend(next_activation, next_a, t);
      store_lanes(then, next.stored(next.round(t)), whole, lanes);
      then += next.view.pixel;
    }
    if (kChain == kLookedUp)
      look_up_pixels(chain.step->tables.data(), first, step, then, next.view.pixel, count, lanes);
  }
}

using FinishLanes = decltype(&finish_lanes<false, kNothing, false>);

template <bool kResidual, bool kBent>
FinishLanes lanes_of_kind(ChainedKind kind) {
  switch (kind) {
    case kNothing: return finish_lanes<kResidual, kNothing, kBent>;
    case kRescaled: return finish_lanes<kResidual, kRescaled, kBent>;
    case kLookedUp: return finish_lanes<kResidual, kLookedUp, kBent>;
    case kSummed: return finish_lanes<kResidual, kSummed, kBent>;
    default: return finish_lanes<kResidual, kMultiplied, kBent>;
  }
}

// What ends the tiles of a step, chosen once. lanes: where results are integers and the frequent ones; room: bytes of a
// pixel that they own.
struct TileEnd {
  Finish finish;
  View2d residual;
  FinishLanes lanes = nullptr;
  int64_t room = 0;

  explicit TileEnd(const Work& w)
      : finish(w.program, w.step, w.arena, w.real), residual(residual_of(w)) {
    if (finish.count != 1 || finish.chains > 1) return;
    const int64_t first = finish.outs[0].room;
    room = first ? first : w.step.out_channels + kWidth;  // what is not stored has room enough
    ChainedKind kind = kNothing;
    bool bent = finish.bent;
    if (finish.chains) {
      const Chain& chain = finish.chained[0];
      if (chain.count != 1 || chain.outs[0].room == 0) return;  // the other way knows results that nobody reads
      const int code = chain.step->kind;
      kind = code == kTable ? kLookedUp : code == kAdd ? kSummed : code == kMultiply ? kMultiplied : kRescaled;
      bent |= bends(chain.step->activation) || !chain.step->slope.empty();
      room = std::min(room, chain.outs[0].room);
    }
    if (residual.plane) lanes = bent ? lanes_of_kind<true, true>(kind) : lanes_of_kind<true, false>(kind);
    else lanes = bent ? lanes_of_kind<false, true>(kind) : lanes_of_kind<false, false>(kind);
  }
};

// The same where results are real.
void finish_real_lanes(const Step& s, const Finish& finish, const int32_t* acc, int64_t acc_step, int64_t pixels, int64_t y,
                       int64_t x, int64_t channel) {
  const Vec mult = load_vec(&s.mult[channel]), bias = load_vec(&s.bias[channel]);
  float* to = finish.real + (y * finish.width + x) * finish.channels + channel;
  for (int64_t p = 0; p < pixels; ++p, acc += acc_step, to += finish.channels) {
    VecInt sum;
    std::memcpy(&sum, acc, sizeof sum);
    store_vec(to, activate(s, __builtin_convertvector(sum, Vec) * mult + bias));
  }
}

// The end of whatever else.
void finish_any_lanes(const Step& s, TileEnd& tile_end, const int32_t* acc, int64_t acc_step, int64_t pixels, int64_t y,
                      int64_t x, int64_t channel) {
  Finish& finish = tile_end.finish;
  for (; pixels > 0; ++y, x = 0) {
    finish.begin_row(y);
    for (; pixels > 0 && x < finish.width; --pixels, ++x, acc += acc_step) {
      VecInt sum;
      std::memcpy(&sum, acc, sizeof sum);
      finish(scaled(s, tile_end.residual, sum, y, x, channel), x, channel);
    }
  }
}

// The end of `pixels` neighbours, at most kRowTile, from (y, x) on, row after row; acc: [pixels][blocks][16].
void finish_tile(const Work& w, TileEnd& tile_end, const int32_t* acc, int64_t pixels, int blocks, int64_t y, int64_t x,
                 int64_t channel, int64_t channels) {
  const Finish& finish = tile_end.finish;
  const int64_t acc_step = int64_t(blocks) * kLanes;
  for (int64_t lane = 0; lane < acc_step && lane < channels; lane += kWidth) {
    const int64_t c = channel + lane;
    if (tile_end.lanes) {
      const int64_t lanes = std::min<int64_t>(kWidth, tile_end.room - c);
      tile_end.lanes(w.step, finish, tile_end.residual, acc + lane, acc_step, pixels, y, x, c, lanes);
    } else if (finish.count == 0 && !tile_end.residual.plane && c + kWidth <= finish.channels) {
      finish_real_lanes(w.step, finish, acc + lane, acc_step, pixels, y, x, c);
    } else {
      finish_any_lanes(w.step, tile_end, acc + lane, acc_step, pixels, y, x, c);
    }
  }
}

}  // namespace
}  // namespace DFQ_ISA
}  // namespace dfq
