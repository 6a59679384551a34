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

  // Room for a thread's chunks.
  struct Scratch {
    std::vector<double> sums, squares;
    std::vector<float> means;
  };
  Scratch scratch() const {
    const size_t each = static_cast<size_t>(chunks_.sums_per_chunk());
    return {std::vector<double>(each), std::vector<double>(each), std::vector<float>(each)};
  }

  // The moments of one chunk. The workspace has one constant, which is overwritten, and one sum.
  template <class Work>
  void measure(Work& work, Scratch& scratch, int64_t chunk, const float* x, int64_t n) {
    const int64_t each = chunks_.sums_per_chunk();
    const double count = static_cast<double>(chunks_.per_channel(n));
    work.run(n, [&](int64_t i, const Vec*, Vec* sum) { sum[0] = load_vec(x + i); });
    work.fold(scratch.sums.data());
    for (int64_t c = 0; c < each; ++c) scratch.means[c] = static_cast<float>(scratch.sums[c] / count);
    work.set_constant(0, scratch.means.data());
    // about a rounded mean m: sum (x - m)^2 = squares + count (mean - m)^2; the second term is below fp32's resolution
    work.run(n, [&](int64_t i, const Vec* constants, Vec* sum) {
      const Vec centred = load_vec(x + i) - constants[0];
      sum[0] = centred * centred;
    });
    work.fold(scratch.squares.data());
    for (int64_t c = 0; c < each; ++c) parts_[chunk * each + c] = {scratch.sums[c] / count, scratch.squares[c]};
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
