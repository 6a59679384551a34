// fake_quant: straight-through fake quantization, with fixed and with learned parameters.
//   math     q = clamp(rne(x * inv + zero_point), quant_min, quant_max); out = (q - zero_point) * scale; inv = 1 / scale
//   traffic  forward: x read, out written, one bit per element; backward: grad and bits read, grad_x written;
//            learned: x and grad read, grad_x written
//   block    1024 elements of memory order; chunks of about 2048 where sums are taken
//   order    every operation rounded on its own, no contraction; sums as reduce.h says
#include "channels.h"
#include "kernels.h"
#include "reduce.h"

namespace dfq {
namespace DFQ_ISA {

namespace {

template <class T>
void forward(const FakeQuantForward& a) {
  const std::vector<float> inv = reciprocals(a.scale, a.view.channels);
  const ChannelConstants<3> channels(a.view, {inv.data(), a.scale, a.zero_point});
  const Vec low = broadcast(a.quant_min), high = broadcast(a.quant_max);
  uint8_t* const mask = a.mask;
  const bool past = results_past_caches<T>(a.view.size, a.threads), ahead = reads_ahead();
  for_blocks(a.view.size, a.threads, past, [&](int64_t start, int64_t n) {
    Reader<T> reader;
    Writer<T> writer(past);
    T* to = static_cast<T*>(a.out) + start;
    const T* x = reader.at(static_cast<const T*>(a.x) + start, n);
    T* out = writer.at(to, n);
    channels.block(start, n, [=](const auto& constants, int64_t begin, int64_t end) DFQ_INLINE {
      const auto quantize = [=, &constants](int64_t j) DFQ_INLINE {  // and the bits of what the clamp left alone
        const Vec zero_point = constants.template get<2>(j);
        const Vec rounded = rne(load_ahead(x + j, ahead) * constants.template get<0>(j) + zero_point);
        const Vec q = clamp(rounded, low, high);
        store_vec(out + j, (q - zero_point) * constants.template get<1>(j));
        return bits_of(equal(q, rounded));
      };
      if (mask) return store_mask(mask, start, begin, end, quantize);
      for (int64_t j = begin; j < end; j += kWidth) quantize(j);
    });
    writer.done(to, n);
  });
  if (mask) clear_behind(mask, a.view.size);
}

template <class T>
void backward(const MaskBackward& a) {
  const bool past = past_caches(a.size * sizeof(T), a.threads), ahead = reads_ahead();
  for_blocks(a.size, a.threads, past, [&](int64_t start, int64_t n) {
    Reader<T> reader;
    Writer<T> writer(past);
    T* to = static_cast<T*>(a.grad_x) + start;
    const T* grad = reader.at(static_cast<const T*>(a.grad_out) + start, n);
    T* out = writer.at(to, n);
    for (int64_t j = 0; j < n; j += kWidth)
      store_vec(out + j, keep_bits(load_bits(a.mask, start + j), load_ahead(grad + j, ahead)));
    writer.done(to, n);
  });
}

template <class T>
void backward_learned(const FakeQuantBackward& a) {
  const int64_t channels = a.view.channels;
  const std::vector<float> inv = reciprocals(a.scale, channels);
  const Chunks chunks(a.view);
  const Rounding rounding(a.quant_min, a.quant_max);
  const bool ahead = reads_ahead();
  const float* const constants[] = {inv.data(), a.zero_point};
  const std::vector<double> total = reduce<T, 2, 2, 3>(chunks, a.threads, constants, {Fold::kSum, Fold::kSum}, [&](auto& work) {
    const T* x = work.gather(0, a.x);
    const T* grad = work.gather(1, a.grad_out);
    T* out = work.place(2, a.grad_x);
    work.run([&](int64_t i, const Vec* k, Vec* sums) DFQ_INLINE {
      const LearnedGradient g = learned_gradient(load_ahead(x + i, ahead), load_ahead(grad + i, ahead), k[0], k[1], rounding);
      store_vec(out + i, g.x);
      sums[0] = sums[0] + g.scale;
      sums[1] = sums[1] + g.outside;
    });
    work.scatter(2, a.grad_x);
  });
  for (int64_t c = 0; c < channels; ++c) {
    a.grad_scale[c] = static_cast<float>(total[c]);
    a.grad_zero_point[c] = static_cast<float>(-total[channels + c]) * a.scale[c];
  }
}

}  // namespace

void fake_quant_forward(const FakeQuantForward& a) {
  with_type(a.dtype, [&](auto type) { forward<decltype(type)>(a); });
}

void mask_backward(const MaskBackward& a) {
  with_type(a.dtype, [&](auto type) { backward<decltype(type)>(a); });
}

void fake_quant_backward(const FakeQuantBackward& a) {
  with_type(a.dtype, [&](auto type) { backward_learned<decltype(type)>(a); });
}

}  // namespace DFQ_ISA
}  // namespace dfq
