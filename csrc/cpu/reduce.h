// The driver of kernels that sum over channels. The partition into chunks depends on the tensor alone, each chunk's sums
// have a place of their own, and they are combined in order: the same bits for any number of threads.
//
// A chunk is laid out as rows of `lanes` floats, and every lane belongs to one channel. Where a channel's elements are
// long rows in memory (NCHW), a chunk is several rows of one channel; else (channels-last) it is a piece of memory, whose
// lanes repeat the pattern of channels. Sums run down the lanes, at most a few hundred additions in fp32, and are folded
// into channels in double.
#pragma once
#include <algorithm>
#include <type_traits>
#include <vector>

#include "elementwise.h"

namespace dfq {
namespace DFQ_ISA {

constexpr int64_t kChunk = 4096;  // floats: two inputs and an output stay in the first-level cache
constexpr int64_t kLanes = 128;   // enough independent additions to hide their latency

class Chunks {
 public:
  explicit Chunks(const View& view) : view_(view), outer_(view.size / (view.channels * view.inner)) {
    by_channel_ = view.channels == 1 || view.inner >= 32;
    const int64_t period = view.channels * view.inner;
    if (by_channel_) {
      lanes_ = kLanes;
      piece_ = view.inner < kChunk ? view.inner : kChunk;
      pieces_ = (view.inner + piece_ - 1) / piece_;
      rows_ = view.inner < 512 ? kChunk / piece_ : 1;  // longer rows stay where they are
      groups_ = (outer_ + rows_ - 1) / rows_;
      count_ = view.channels * groups_ * pieces_;
      capacity_ = rows_ * piece_;
    } else {
      lanes_ = (kLanes + period - 1) / period * period;
      const int64_t repeats = kChunk / lanes_ > 8 ? kChunk / lanes_ : 8;
      capacity_ = lanes_ * repeats;
      count_ = (view.size + capacity_ - 1) / capacity_;
      channel_of_lane_.resize(static_cast<size_t>(lanes_));
      for (int64_t lane = 0; lane < lanes_; ++lane)
        channel_of_lane_[lane] = static_cast<int32_t>(lane / view.inner % view.channels);
    }
  }

  bool by_channel() const { return by_channel_; }
  int64_t inner() const { return view_.inner; }
  int64_t count() const { return count_; }
  int64_t lanes() const { return lanes_; }
  int64_t capacity() const { return capacity_ + kWidth; }
  int64_t grain() const { return kGrain / capacity_ + 1; }
  int64_t channel_of_lane(int64_t lane) const { return channel_of_lane_[lane]; }
  int64_t sums_per_chunk() const { return by_channel_ ? 1 : view_.channels; }
  // Chunks are numbered channel by channel, so that those of a channel are neighbours.
  int64_t channel(int64_t chunk) const { return chunk / (groups_ * pieces_); }

  // Calls row(offset in the tensor, offset in the chunk, floats) for the contiguous pieces of a chunk; returns its size.
  template <class Row>
  int64_t rows(int64_t chunk, const Row& row) const {
    if (!by_channel_) {
      const int64_t start = chunk * capacity_;
      const int64_t n = view_.size - start < capacity_ ? view_.size - start : capacity_;
      row(start, int64_t(0), n);
      return n;
    }
    const int64_t channel = chunk / (groups_ * pieces_), rest = chunk % (groups_ * pieces_);
    const int64_t first = rest / pieces_ * rows_, begin = rest % pieces_ * piece_;
    const int64_t length = view_.inner - begin < piece_ ? view_.inner - begin : piece_;
    const int64_t last = first + rows_ < outer_ ? first + rows_ : outer_;
    int64_t at = 0;
    for (int64_t n = first; n < last; ++n, at += length)
      row((n * view_.channels + channel) * view_.inner + begin, at, length);
    return at;
  }

  // Elements of each channel in a chunk of n.
  int64_t per_channel(int64_t n) const { return by_channel_ ? n : n / view_.channels; }

  // The chunk as fp32, readable in whole vectors; `buffer` holds capacity() floats, and fp32 that lies well stays there.
  template <class T>
  const float* gather(int64_t chunk, const T* from, float* buffer) const {
    if (std::is_same<T, float>::value && lanes_ % kWidth == 0 && (!by_channel_ || rows_ == 1)) {
      const float* in_place = nullptr;
      rows(chunk, [&](int64_t offset, int64_t, int64_t n) {
        if (n % kWidth == 0) in_place = reinterpret_cast<const float*>(from) + offset;
      });
      if (in_place) return in_place;
    }
    rows(chunk, [&](int64_t offset, int64_t at, int64_t n) { load(from + offset, buffer + at, n); });
    return buffer;
  }
  template <class T>
  void scatter(int64_t chunk, const float* buffer, T* to) const {
    rows(chunk, [&](int64_t offset, int64_t at, int64_t n) { store(buffer + at, to + offset, n); });
  }

 private:
  View view_;
  int64_t outer_;
  bool by_channel_;
  int64_t lanes_ = 0, piece_ = 0, pieces_ = 1, rows_ = 1, groups_ = 1, count_ = 0, capacity_ = 0;
  std::vector<int32_t> channel_of_lane_;
};

// What a thread needs for its chunks: K constants, S sums and B buffers.
template <int K, int S, int B>
class Workspace {
 public:
  Workspace(const Chunks& chunks, const float* const (&values)[K]) : chunks_(chunks), lanes_(chunks.lanes()) {
    for (int k = 0; k < K; ++k) values_[k] = values[k];
    constants_.resize(static_cast<size_t>(K * (lanes_ + kWidth)));
    sums_.resize(static_cast<size_t>(S * (lanes_ + kWidth)));
    buffers_.resize(static_cast<size_t>(B * chunks.capacity()));
    if (!chunks.by_channel()) set_constants(0);
  }

  void start(int64_t chunk) {
    if (chunks_.by_channel()) set_constants(chunks_.channel(chunk));
  }

  float* buffer(int b) { return buffers_.data() + b * chunks_.capacity(); }

  // Overrides a constant with the values of a chunk's own channels.
  void set_constant(int k, const float* per_sum) {
    float* to = constants_.data() + k * stride();
    for (int64_t lane = 0; lane < lanes_; ++lane) to[lane] = per_sum[chunks_.by_channel() ? 0 : chunks_.channel_of_lane(lane)];
  }

  // step(i, constants, sums): element i of the chunk and its neighbours; sums[s] is added to the lanes' sums.
  // Down the lanes, a few vectors side by side: their sums stay in registers and do not wait for one another.
  template <class Step>
  void run(int64_t n, const Step& step) {
    constexpr int kBeside = S >= 3 ? 1 : 4;
    const int64_t lanes = lanes_, step_of_sums = stride(), whole = n / lanes * lanes;
    const float* const constants = constants_.data();
    float* const sums = sums_.data();
    const int64_t vectors = lanes / kWidth * kWidth, rest = n - whole;
    if (vectors < lanes) {  // first, because a step may write past these lanes into the next row's
      for (int s = 0; s < S; ++s) std::fill(sums + s * step_of_sums + vectors, sums + s * step_of_sums + lanes, 0.0f);
      for (int64_t row = 0; row < whole; row += lanes) partial(row, vectors, lanes - vectors, step);
    }
    int64_t lane = 0;
    for (; lane + kBeside * kWidth <= lanes; lane += kBeside * kWidth)
      columns<kBeside>(lane, whole, lanes, constants, sums, step_of_sums, step);
    for (; lane < vectors; lane += kWidth) columns<1>(lane, whole, lanes, constants, sums, step_of_sums, step);
    for (int64_t at = 0; at < rest; at += kWidth) partial(whole, at, rest - at, step);
  }

  // The sums of the lanes by channel, in double; `to` has S * sums_per_chunk() places. Overwrites the lanes.
  void fold(double* to) {
    for (int s = 0; s < S; ++s) {
      float* const sums = sums_.data() + s * stride();
      if (chunks_.by_channel()) {
        for (int64_t half = lanes_ / 2; half >= 8; half /= 2)  // the same order whatever the width of vectors
          for (int64_t i = 0; i < half; ++i) sums[i] += sums[i + half];
        double total = 0;
        for (int i = 0; i < 8; ++i) total += static_cast<double>(sums[i]);
        to[s] = total;
        continue;
      }
      const int64_t channels = chunks_.sums_per_chunk();
      double* const own = to + s * channels;
      for (int64_t c = 0; c < channels; ++c) own[c] = 0;
      if (chunks_.inner() == 1) {
        for (int64_t row = 0; row < lanes_; row += channels)
          for (int64_t c = 0; c < channels; ++c) own[c] += static_cast<double>(sums[row + c]);
      } else {
        for (int64_t lane = 0; lane < lanes_; ++lane) own[chunks_.channel_of_lane(lane)] += static_cast<double>(sums[lane]);
      }
    }
  }

 private:
  int64_t stride() const { return lanes_ + kWidth; }

  void set_constants(int64_t channel) {
    for (int k = 0; k < K; ++k) {
      float* to = constants_.data() + k * stride();
      if (!values_[k]) continue;
      for (int64_t lane = 0; lane < lanes_; ++lane)
        to[lane] = values_[k][chunks_.by_channel() ? channel : chunks_.channel_of_lane(lane)];
    }
  }

  // The whole rows of `beside` vectors of lanes; sets their sums.
  template <int beside, class Step>
  static inline void columns(int64_t lane, int64_t whole, int64_t lanes, const float* constants, float* sums,
                             int64_t step_of_sums, const Step& step) {
    Vec k[beside][K > 0 ? K : 1], total[beside][S > 0 ? S : 1];
    for (int b = 0; b < beside; ++b) {
      for (int i = 0; i < K; ++i) k[b][i] = load_vec(constants + i * step_of_sums + lane + b * kWidth);
      for (int s = 0; s < S; ++s) total[b][s] = Vec{};
    }
    for (int64_t row = 0; row < whole; row += lanes)
      for (int b = 0; b < beside; ++b) {
        Vec added[S > 0 ? S : 1];
        step(row + lane + b * kWidth, k[b], added);
        for (int s = 0; s < S; ++s) total[b][s] = total[b][s] + added[s];
      }
    for (int b = 0; b < beside; ++b)
      for (int s = 0; s < S; ++s) store_vec(sums + s * step_of_sums + lane + b * kWidth, total[b][s]);
  }

  // One vector whose first `valid` elements count.
  template <class Step>
  void partial(int64_t row, int64_t lane, int64_t valid, const Step& step) {
    Vec k[K > 0 ? K : 1], added[S > 0 ? S : 1];
    for (int i = 0; i < K; ++i) k[i] = load_vec(constants_.data() + i * stride() + lane);
    step(row + lane, k, added);
    for (int s = 0; s < S; ++s) {
      float* at = sums_.data() + s * stride() + lane;
      store_vec(at, load_vec(at) + first_lanes(added[s], valid));
    }
  }

  const Chunks& chunks_;
  int64_t lanes_;
  const float* values_[K > 0 ? K : 1];
  std::vector<float> constants_, sums_, buffers_;
};

// Adds the chunks' sums of every channel in order: total[s * channels + c].
static inline void combine(const Chunks& chunks, const View& view, int S, const std::vector<double>& parts, double* total) {
  const int64_t each = chunks.sums_per_chunk();
  for (int64_t i = 0; i < S * view.channels; ++i) total[i] = 0;
  for (int64_t chunk = 0; chunk < chunks.count(); ++chunk)
    for (int s = 0; s < S; ++s)
      for (int64_t c = 0; c < each; ++c)
        total[s * view.channels + (chunks.by_channel() ? chunks.channel(chunk) : c)] +=
            parts[static_cast<size_t>((chunk * S + s) * each + c)];
}

}  // namespace DFQ_ISA
}  // namespace dfq
