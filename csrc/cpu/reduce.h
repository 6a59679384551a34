// The driver of kernels that reduce over channels. The partition depends on the tensor alone and its parts are combined in
// order: the same bits for any number of threads.
//
// A tensor is a sequence of groups of chunks, in memory order. A chunk is read as rows of `lanes` elements, and every lane
// belongs to one channel. Where a channel's elements are rows in memory (NCHW), a chunk is a piece of such a row, or
// several short rows of one channel side by side, and each channel has lanes of its own; else (channels-last) it is a
// piece of memory, whose lanes repeat the pattern of channels. Accumulators run down the lanes of a whole group, at most
// about kAdditions additions in fp32, and are then folded into channels in double.
#pragma once
#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "elementwise.h"

namespace dfq {
namespace DFQ_ISA {

constexpr int64_t kChunk = 2048;     // elements: two inputs and an output stay in the first-level cache
constexpr int64_t kLanes = 32;       // enough independent additions to hide their latency
constexpr int64_t kAdditions = 512;  // of one lane in fp32

class Chunks {
 public:
  explicit Chunks(const View& view) : view_(view), outer_(view.size / (view.channels * view.inner)) {
    by_channel_ = view.channels == 1 || view.inner >= kLanes;
    int64_t additions;  // per lane
    if (by_channel_) {
      lanes_ = kLanes;
      const bool in_place = view.channels == 1 || view.inner >= 512 || (view.inner >= 128 && view.inner % 16 == 0);
      piece_ = view.inner < kChunk ? view.inner : kChunk;
      pieces_ = (view.inner + piece_ - 1) / piece_;
      rows_ = in_place ? 1 : kChunk / piece_;
      stacks_ = (outer_ + rows_ - 1) / rows_;
      count_ = stacks_ * view.channels * pieces_;
      capacity_ = rows_ * piece_;
      additions = outer_ * view.inner / lanes_;
    } else {
      const int64_t period = view.channels * view.inner, whole = std::lcm(period, int64_t(16));
      lanes_ = whole <= 1024 ? whole : period;
      if (lanes_ < 64) lanes_ *= 64 / lanes_;
      capacity_ = lanes_ * std::max(kChunk / lanes_, int64_t(8));
      count_ = (view.size + capacity_ - 1) / capacity_;
      additions = view.size / lanes_;
      channel_of_lane_.resize(static_cast<size_t>(lanes_));
      for (int64_t lane = 0; lane < lanes_; ++lane)
        channel_of_lane_[lane] = static_cast<int32_t>(lane / view.inner % view.channels);
    }
    // enough for threads, few enough that folding is little, and at least a few for many small channels
    groups_ = std::min(std::max(view.size / (2 * kGrain), int64_t(1)), std::max(additions / (kAdditions / 4), int64_t(4)));
    groups_ = std::min(std::max(groups_, (additions + kAdditions - 1) / kAdditions), count_);
  }

  bool by_channel() const { return by_channel_; }
  int64_t channels() const { return view_.channels; }
  int64_t inner() const { return view_.inner; }
  int64_t lanes() const { return lanes_; }
  int64_t capacity() const { return capacity_ + kWidth; }
  int64_t channel_of_lane(int64_t lane) const { return channel_of_lane_[lane]; }
  int64_t size() const { return view_.size; }

  int64_t groups() const { return groups_; }
  int64_t group_begin(int64_t group) const { return count_ * group / groups_; }
  int64_t channel(int64_t chunk) const {
    return by_channel_ ? (pieces_ == 1 ? chunk : chunk / pieces_) % view_.channels : 0;
  }

  // Calls row(offset in the tensor, offset in the chunk, elements) for the contiguous pieces of a chunk; returns its size.
  template <class Row>
  int64_t rows(int64_t chunk, const Row& row) const {
    if (!by_channel_) {
      const int64_t start = chunk * capacity_;
      const int64_t n = view_.size - start < capacity_ ? view_.size - start : capacity_;
      row(start, int64_t(0), n);
      return n;
    }
    const int64_t line = chunk / pieces_, stack = line / view_.channels, channel = line % view_.channels;
    const int64_t begin = chunk % pieces_ * piece_;
    const int64_t length = view_.inner - begin < piece_ ? view_.inner - begin : piece_;
    const int64_t first = stack * rows_, last = first + rows_ < outer_ ? first + rows_ : outer_;
    int64_t at = 0;
    for (int64_t n = first; n < last; ++n, at += length)
      row((n * view_.channels + channel) * view_.inner + begin, at, length);
    return at;
  }
  // How many elements the chunk has, and where it lies in the tensor if kernels may read and write it there in whole
  // vectors; else -1.
  int64_t place(int64_t chunk, int64_t& size) const {
    if (by_channel_ && rows_ != 1) {
      size = rows(chunk, [](int64_t, int64_t, int64_t) {});
      return -1;
    }
    int64_t offset;
    if (by_channel_) {
      const int64_t line = pieces_ == 1 ? chunk : chunk / pieces_, begin = (chunk - line * pieces_) * piece_;
      size = view_.inner - begin < piece_ ? view_.inner - begin : piece_;
      offset = line * view_.inner + begin;
    } else {
      offset = chunk * capacity_;
      size = view_.size - offset < capacity_ ? view_.size - offset : capacity_;
    }
    return lanes_ % kWidth == 0 && size % kWidth == 0 ? offset : -1;
  }

 private:
  View view_;
  int64_t outer_;
  bool by_channel_;
  int64_t lanes_ = 0, piece_ = 0, pieces_ = 1, rows_ = 1, stacks_ = 1, count_ = 0, capacity_ = 0, groups_ = 1;
  std::vector<int32_t> channel_of_lane_;
};

enum class Fold { kSum = 0, kLeast, kMost };

static inline float neutral(Fold fold) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  return fold == Fold::kSum ? 0.0f : fold == Fold::kLeast ? kInfinity : -kInfinity;
}

template <class Number>
static inline Number joined(Fold fold, Number one, Number other) {
  if (fold == Fold::kSum) return one + other;
  return fold == Fold::kLeast ? (other < one ? other : one) : (other > one ? other : one);
}

// What a thread needs for its chunks: K constants per channel, A accumulators per lane, B buffers.
template <class T, int K, int A, int B>
class Workspace {
 public:
  Workspace(const Chunks& chunks, const float* const (&values)[K], const Fold* folds, bool past)
      : chunks_(chunks), past_(past), lanes_(chunks.lanes()), stride_(lanes_ + kWidth) {
    for (int k = 0; k < K; ++k) values_[k] = values[k];
    for (int a = 0; a < A; ++a) folds_[a] = folds[a];
    constants_.resize(static_cast<size_t>(K * stride_));
    totals_.resize(static_cast<size_t>((chunks.by_channel() ? chunks.channels() : 1) * A * stride_));
    buffers_.resize(static_cast<size_t>(B * chunks.capacity()));
    if (!chunks.by_channel()) {
      set_constants(0);
      own_ = totals_.data();
    }
  }

  // Forgets the accumulators.
  void clear() {
    for (size_t at = 0, a = 0; at < totals_.size(); at += stride_, a = a + 1 == A ? 0 : a + 1)
      std::fill(&totals_[at], &totals_[at] + stride_, neutral(folds_[a]));
  }

  // The chunk that the following calls are about.
  void start(int64_t chunk) {
    chunk_ = chunk;
    place_ = chunks_.place(chunk, size_);
    if (!chunks_.by_channel()) return;
    const int64_t channel = chunks_.channel(chunk);
    if (channel != channel_) set_constants(channel);
    channel_ = channel;
    own_ = totals_.data() + channel * A * stride_;
  }

  // Its elements, readable in whole vectors.
  const T* gather(int b, const void* from) {
    if (place_ >= 0) return static_cast<const T*>(from) + place_;
    T* const buffer = buffers_.data() + b * chunks_.capacity();
    chunks_.rows(chunk_, [&](int64_t offset, int64_t at, int64_t n) {
      std::memcpy(buffer + at, static_cast<const T*>(from) + offset, n * sizeof(T));
    });
    return buffer;
  }

  // Where its results may be written in whole vectors, and what brings them to `to` afterwards.
  T* place(int b, void* to) {
    return place_ >= 0 && !past_ ? static_cast<T*>(to) + place_ : buffers_.data() + b * chunks_.capacity();
  }
  void scatter(int b, void* to) {
    const T* const buffer = buffers_.data() + b * chunks_.capacity();
    if (past_ && place_ >= 0) return copy_past_caches(static_cast<T*>(to) + place_, buffer, size_ * sizeof(T));
    if (place_ >= 0) return;
    chunks_.rows(chunk_, [&](int64_t offset, int64_t at, int64_t n) {
      std::memcpy(static_cast<T*>(to) + offset, buffer + at, n * sizeof(T));
    });
  }

  // step(i, constants, totals): takes element i of the chunk and its neighbours into the totals of their lanes.
  // Down the lanes, a few vectors side by side: their totals stay in registers and do not wait for one another.
  template <class Step>
  void run(const Step& step) {
    constexpr int kBeside = K + A <= 5 ? 4 : 2;  // as many as the registers hold
    const int64_t lanes = lanes_, whole = size_ / lanes * lanes, vectors = lanes / kWidth * kWidth, rest = size_ - whole;
    if (vectors < lanes)  // first, because a step may write past these lanes into the next row's
      for (int64_t row = 0; row < whole; row += lanes) partial(row, vectors, lanes - vectors, step);
    int64_t lane = 0;
    for (; lane + kBeside * kWidth <= vectors; lane += kBeside * kWidth) columns<kBeside>(lane, whole, step);
    for (; lane + 2 * kWidth <= vectors; lane += 2 * kWidth) columns<2>(lane, whole, step);
    for (; lane < vectors; lane += kWidth) columns<1>(lane, whole, step);
    for (int64_t at = 0; at < rest; at += kWidth) partial(whole, at, rest - at, step);
  }

  // Takes the lanes into the A * channels places of `to`.
  void fold(double* to) {
    const int64_t channels = chunks_.channels();
    if (chunks_.by_channel()) {
      for (int64_t c = 0; c < channels; ++c)
        for (int a = 0; a < A; ++a) fold_lanes(c, a, to[a * channels + c]);
      return;
    }
    for (int a = 0; a < A; ++a) {
      const float* const totals = totals_.data() + a * stride_;
      double* const own = to + a * channels;
      if (chunks_.inner() == 1 && folds_[a] == Fold::kSum) {
        for (int64_t row = 0; row < lanes_; row += channels)
          for (int64_t c = 0; c < channels; ++c) own[c] += static_cast<double>(totals[row + c]);
      } else {
        for (int64_t lane = 0; lane < lanes_; ++lane) {
          double& total = own[chunks_.channel_of_lane(lane)];
          total = joined(folds_[a], total, static_cast<double>(totals[lane]));
        }
      }
    }
  }

 private:
  void fold_lanes(int64_t channel, int a, double& to) {
    float* const totals = &totals_[(channel * A + a) * stride_];
    for (int64_t half = kLanes / 2; half >= 8; half /= 2)  // the same order whatever the width of vectors
      for (int64_t i = 0; i < half; ++i) totals[i] = joined(folds_[a], totals[i], totals[i + half]);
    double eight[8];
    for (int i = 0; i < 8; ++i) eight[i] = static_cast<double>(totals[i]);
    for (int half = 4; half >= 1; half /= 2)
      for (int i = 0; i < half; ++i) eight[i] = joined(folds_[a], eight[i], eight[i + half]);
    to = joined(folds_[a], to, eight[0]);
  }

  void set_constants(int64_t channel) {
    for (int k = 0; k < K; ++k) {
      float* const to = constants_.data() + k * stride_;
      if (chunks_.by_channel()) {
        const Vec value = broadcast(values_[k][channel]);
        for (int64_t lane = 0; lane < kLanes; lane += kWidth) store_vec(to + lane, value);
      } else {
        for (int64_t lane = 0; lane < lanes_; ++lane) to[lane] = values_[k][chunks_.channel_of_lane(lane)];
      }
    }
  }

  // The whole rows of `beside` vectors of lanes.
  template <int beside, class Step>
  void columns(int64_t lane, int64_t whole, const Step& step) {
    Vec k[beside][K], total[beside][A > 0 ? A : 1];
    for (int b = 0; b < beside; ++b) {
      for (int i = 0; i < K; ++i) k[b][i] = load_vec(constants_.data() + i * stride_ + lane + b * kWidth);
      for (int a = 0; a < A; ++a) total[b][a] = load_vec(own_ + a * stride_ + lane + b * kWidth);
    }
    const int64_t lanes = lanes_;
    for (int64_t row = 0; row < whole; row += lanes)
#pragma GCC unroll 4
      for (int b = 0; b < beside; ++b) step(row + lane + b * kWidth, k[b], total[b]);
    for (int b = 0; b < beside; ++b)
      for (int a = 0; a < A; ++a) store_vec(own_ + a * stride_ + lane + b * kWidth, total[b][a]);
  }

  // One vector whose first `valid` elements count.
  template <class Step>
  void partial(int64_t row, int64_t lane, int64_t valid, const Step& step) {
    Vec k[K], before[A > 0 ? A : 1], total[A > 0 ? A : 1];
    for (int i = 0; i < K; ++i) k[i] = load_vec(constants_.data() + i * stride_ + lane);
    for (int a = 0; a < A; ++a) total[a] = before[a] = load_vec(own_ + a * stride_ + lane);
    step(row + lane, k, total);
    for (int a = 0; a < A; ++a) store_vec(own_ + a * stride_ + lane, first_lanes(total[a], before[a], valid));
  }

  const Chunks& chunks_;
  bool past_;  // the caches
  int64_t lanes_, stride_, chunk_ = 0, place_ = -1, size_ = 0, channel_ = -1;
  const float* values_[K];
  Fold folds_[A > 0 ? A : 1];
  float* own_ = nullptr;  // the accumulators of the chunk's lanes
  std::vector<float> constants_, totals_;
  std::vector<T> buffers_;
};

// Calls body(work) for every chunk of the tensor, without sums.
template <class T, int K, int B, class Body>
static void for_chunks(const Chunks& chunks, int threads, const float* const (&values)[K], const Body& body) {
  const bool past = results_past_caches<T>(chunks.size(), threads);
  parallel_for(chunks.groups(), 1, chunks.size() > kGrain ? threads : 1, [&](int64_t begin, int64_t end) {
    Workspace<T, K, 0, B> work(chunks, values, nullptr, past);
    for (int64_t chunk = chunks.group_begin(begin); chunk < chunks.group_begin(end); ++chunk) {
      work.start(chunk);
      body(work);
    }
    if (past) written_past_caches();
  });
}

// Calls body(work) for every chunk of the tensor and gives total[a * channels + c].
template <class T, int K, int A, int B, class Body>
static std::vector<double> reduce(const Chunks& chunks, int threads, const float* const (&values)[K],
                                  const Fold (&folds)[A], const Body& body) {
  const int64_t channels = chunks.channels(), each = A * channels;
  std::vector<double> parts(static_cast<size_t>((chunks.groups() + 1) * each));
  for (int64_t i = 0; i < static_cast<int64_t>(parts.size()); ++i) parts[i] = neutral(folds[i / channels % A]);
  const bool past = results_past_caches<T>(chunks.size(), threads);
  parallel_for(chunks.groups(), 1, chunks.size() > kGrain ? threads : 1, [&](int64_t begin, int64_t end) {
    Workspace<T, K, A, B> work(chunks, values, folds, past);
    for (int64_t group = begin; group < end; ++group) {
      work.clear();
      for (int64_t chunk = chunks.group_begin(group); chunk < chunks.group_begin(group + 1); ++chunk) {
        work.start(chunk);
        body(work);
      }
      work.fold(&parts[group * each]);
    }
    if (past) written_past_caches();
  });
  double* const total = &parts[chunks.groups() * each];
  for (int64_t group = 0; group < chunks.groups(); ++group)
    for (int a = 0; a < A; ++a)
      for (int64_t c = 0; c < channels; ++c)
        total[a * channels + c] = joined(folds[a], total[a * channels + c], parts[group * each + a * channels + c]);
  parts.erase(parts.begin(), parts.begin() + chunks.groups() * each);
  return parts;
}

}  // namespace DFQ_ISA
}  // namespace dfq
