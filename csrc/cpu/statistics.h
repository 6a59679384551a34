// Mean and variance of channels, one read of memory: a chunk's mean, then its squared deviations while it is in cache,
// then chunks are joined in order and in double. No digits are lost where the mean is far from 0.
//   Source: Chan, Golub, LeVeque 1983, eq. 2.1.
#pragma once
#include "channels.h"

namespace dfq {
namespace DFQ_ISA {

struct ChunkMoments {
  double mean, squares;
};

class Moments {
 public:
  Moments(const Chunks& chunks, const View& view)
      : chunks_(chunks), view_(view), parts_(static_cast<size_t>(chunks.count() * chunks.sums_per_chunk())),
        counts_(static_cast<size_t>(chunks.count())) {}

  // The moments of one chunk. The workspace's first constant is overwritten; it has one sum.
  template <class Work>
  void measure(Work& work, int64_t chunk, const float* x, int64_t n) {
    const int64_t each = chunks_.sums_per_chunk();
    const double count = static_cast<double>(chunks_.per_channel(n));
    std::vector<double> sums(static_cast<size_t>(each));
    std::vector<float> means(static_cast<size_t>(each));
    work.run(n, [&](int64_t i, const Vec*, Vec* sum) { sum[0] = load_vec(x + i); });
    work.fold(sums.data());
    for (int64_t c = 0; c < each; ++c) means[c] = static_cast<float>(sums[c] / count);
    work.set_constant(0, means.data());
    // about a rounded mean m: sum (x - m)^2 = squares + count (mean - m)^2; the second term is below fp32's resolution
    work.run(n, [&](int64_t i, const Vec* constants, Vec* sum) {
      const Vec centred = load_vec(x + i) - constants[0];
      sum[0] = centred * centred;
    });
    std::vector<double> squares(static_cast<size_t>(each));
    work.fold(squares.data());
    for (int64_t c = 0; c < each; ++c) parts_[chunk * each + c] = {sums[c] / count, squares[c]};
    counts_[chunk] = count;
  }

  // Mean and biased variance of every channel.
  void finish(float* mean, float* var) const {
    const int64_t each = chunks_.sums_per_chunk();
    std::vector<double> n(static_cast<size_t>(view_.channels)), m(n), s(n);
    for (int64_t chunk = 0; chunk < chunks_.count(); ++chunk)
      for (int64_t i = 0; i < each; ++i) {
        const int64_t c = chunks_.by_channel() ? chunks_.channel(chunk) : i;
        const ChunkMoments& part = parts_[chunk * each + i];
        const double count = counts_[chunk], total = n[c] + count, delta = part.mean - m[c];
        s[c] += part.squares + delta * delta * n[c] * count / total;
        m[c] += delta * count / total;
        n[c] = total;
      }
    for (int64_t c = 0; c < view_.channels; ++c) {
      mean[c] = static_cast<float>(m[c]);
      var[c] = static_cast<float>(s[c] / n[c]);
    }
  }

 private:
  const Chunks& chunks_;
  View view_;
  std::vector<ChunkMoments> parts_;
  std::vector<double> counts_;
};

}  // namespace DFQ_ISA
}  // namespace dfq
