// The native module: one m.def per kernel, for every device. Addresses come in as integers; whoever calls has checked
// shapes, types and devices and keeps the tensors alive. The interpreter's lock is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "run.h"

namespace py = pybind11;
using namespace dfq;

namespace {

using Address = uintptr_t;
using Addresses = std::vector<int64_t>;

const void* input(Address address) { return reinterpret_cast<const void*>(address); }
void* output(Address address) { return reinterpret_cast<void*>(address); }
const float* floats(Address address) { return reinterpret_cast<const float*>(address); }
float* floats_out(Address address) { return reinterpret_cast<float*>(address); }
uint8_t* bytes(Address address) { return reinterpret_cast<uint8_t*>(address); }

// (device or -1 for the CPU, threads of the CPU, stream of the device, workspace on the device)
using Where = std::tuple<int, int, Address, Address>;

int threads_of(const Where& where) { return std::get<1>(where); }
Queue queue_of(const Where& where) { return {std::get<0>(where), output(std::get<2>(where)), output(std::get<3>(where))}; }

#define DFQ_RUN(name, type, ...) run<type>(queue_of(where), &CpuKernels::name, &CudaKernels::name, type{__VA_ARGS__})

}  // namespace

void bind_programs(py::module_& m);  // program_bindings.cpp
void bind_calls(py::module_& m);     // call_bindings.cpp

#ifndef DFQ_SOURCES
#define DFQ_SOURCES unknown
#endif
#define DFQ_TEXT_OF(word) #word
#define DFQ_TEXT(word) DFQ_TEXT_OF(word)

PYBIND11_MODULE(_native, m) {
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  m.attr("isa") = cpu_kernels().isa;
  m.attr("cuda") = cuda_kernels() != nullptr;
  m.attr("emulated") = kEmulated;
  m.attr("sources") = DFQ_TEXT(DFQ_SOURCES);  // setup.py's digest of what it was built from

  bind_programs(m);
  bind_calls(m);

  m.def("workspace_bytes", [](int64_t size, int64_t channels, int64_t inner) {
    return cuda_kernels()->workspace_bytes({size, channels, inner});
  });

  m.def("fake_quant_forward", [](int dtype, const Where& where, int64_t size, int64_t channels, int64_t inner, Address x,
                                 Address scale, Address zero_point, float low, float high, Address out, Address mask) {
    DFQ_RUN(fake_quant_forward, FakeQuantForward, dtype, threads_of(where), {size, channels, inner}, input(x), floats(scale),
                                      floats(zero_point), low, high, output(out), bytes(mask));
  }, Unlocked());

  m.def("mask_backward", [](int dtype, const Where& where, int64_t size, Address grad_out, Address mask, Address grad_x) {
    DFQ_RUN(mask_backward, MaskBackward, dtype, threads_of(where), size, input(grad_out), bytes(mask), output(grad_x));
  }, Unlocked());

  m.def("fake_quant_backward", [](int dtype, const Where& where, int64_t size, int64_t channels, int64_t inner,
                                  Address grad_out, Address x, Address scale, Address zero_point, float low, float high,
                                  Address grad_x, Address grad_scale, Address grad_zero_point) {
    DFQ_RUN(fake_quant_backward, FakeQuantBackward, dtype, threads_of(where), {size, channels, inner}, input(grad_out), input(x), floats(scale),
                                       floats(zero_point), low, high, output(grad_x), floats_out(grad_scale),
                                       floats_out(grad_zero_point));
  }, Unlocked());

  m.def("observe_fake_quant_forward", [](int dtype, const Where& where, int64_t size, Address x, Address running_min,
                                         Address running_max, Address scale, Address zero_point, float averaging,
                                         float low, float high, bool symmetric, Address out, Address mask) {
    DFQ_RUN(observe_fake_quant_forward, ObserveFakeQuantForward, dtype, threads_of(where), size, input(x),
         {floats_out(running_min), floats_out(running_max), floats_out(scale), floats_out(zero_point), averaging, low,
          high, symmetric},
         output(out), bytes(mask));
  }, Unlocked());

  m.def("fake_quant_weights", [](int dtype, int out_dtype, const Where& where, const Addresses& weights, const Addresses& channels,
                                 const Addresses& sizes, const Addresses& bits, const Addresses& outs,
                                 const Addresses& scales) {
    DFQ_RUN(fake_quant_weights, FakeQuantWeights, dtype, out_dtype, threads_of(where), static_cast<int64_t>(weights.size()), weights.data(),
                                      channels.data(), sizes.data(), bits.data(), outs.data(), scales.data());
  }, Unlocked());

  m.def("bn_stats_forward", [](int dtype, const Where& where, int64_t size, int64_t channels, int64_t inner, Address x,
                               Address mean, Address var) {
    DFQ_RUN(bn_stats_forward, BnStatsForward, dtype, threads_of(where), {size, channels, inner}, input(x), floats_out(mean), floats_out(var));
  }, Unlocked());

  m.def("bn_stats_backward", [](int dtype, const Where& where, int64_t size, int64_t channels, int64_t inner,
                                Address grad_mean, Address grad_var, Address x, Address mean, Address grad_x) {
    DFQ_RUN(bn_stats_backward, BnStatsBackward, dtype, threads_of(where), {size, channels, inner}, floats(grad_mean), floats(grad_var),
                                     input(x), floats(mean), output(grad_x));
  }, Unlocked());

  m.def("bn_act_stats_forward", [](int dtype, const Where& where, int64_t size, int64_t channels, int64_t inner, Address x,
                                   Address weight, Address bias, Address running_mean, Address running_var, float eps,
                                   int activation, Address out, Address mean, Address var) {
    DFQ_RUN(bn_act_stats_forward, BnActStatsForward, dtype, threads_of(where), {size, channels, inner}, input(x), floats(weight), floats(bias),
                                        floats(running_mean), floats(running_var), eps, activation, output(out),
                                        floats_out(mean), floats_out(var));
  }, Unlocked());

  m.def("bn_act_stats_backward", [](int dtype, const Where& where, int64_t size, int64_t channels, int64_t inner,
                                    Address grad_out, Address grad_mean, Address grad_var, Address x, Address batch_mean,
                                    Address weight, Address bias, Address running_mean, Address running_var, float eps,
                                    int activation, Address grad_x) {
    DFQ_RUN(bn_act_stats_backward, BnActStatsBackward, dtype, threads_of(where), {size, channels, inner}, input(grad_out), floats(grad_mean),
                                         floats(grad_var), input(x), floats(batch_mean), floats(weight), floats(bias),
                                         floats(running_mean), floats(running_var), eps, activation, output(grad_x));
  }, Unlocked());

  m.def("bn_act_fake_quant_forward", [](int dtype, const Where& where, int64_t size, int64_t channels, int64_t inner, Address x,
                                        Address weight, Address bias, Address running_mean, Address running_var,
                                        bool training, bool observe, float momentum, float eps, int activation,
                                        Address running_min, Address running_max, Address scale, Address zero_point,
                                        float averaging, float low, float high, bool symmetric, Address out,
                                        Address mean, Address var, Address used) {
    DFQ_RUN(bn_act_fake_quant_forward, BnActFakeQuantForward, dtype, threads_of(where), {size, channels, inner}, input(x), floats(weight), floats(bias), floats_out(running_mean),
         floats_out(running_var), training, observe, momentum, eps, activation,
         {floats_out(running_min), floats_out(running_max), floats_out(scale), floats_out(zero_point), averaging, low,
          high, symmetric},
         output(out), floats_out(mean), floats_out(var), floats_out(used));
  }, Unlocked());

  m.def("bn_act_fake_quant_backward", [](int dtype, const Where& where, int64_t size, int64_t channels, int64_t inner,
                                         Address grad_out, Address x, Address weight, Address bias, Address mean,
                                         Address var, Address scale, Address zero_point, bool training, float eps,
                                         int activation, float low, float high, Address grad_x, Address grad_weight,
                                         Address grad_bias, Address grad_scale, Address grad_zero_point) {
    DFQ_RUN(bn_act_fake_quant_backward, BnActFakeQuantBackward, dtype, threads_of(where), {size, channels, inner}, input(grad_out), input(x), floats(weight), floats(bias), floats(mean),
         floats(var), floats(scale), floats(zero_point), training, eps, activation, low, high, output(grad_x),
         floats_out(grad_weight), floats_out(grad_bias), floats_out(grad_scale), floats_out(grad_zero_point));
  }, Unlocked());

  m.def("bn_stat_loss_forward", [](const Where& where, const Addresses& means, const Addresses& vars, const Addresses& running_means,
                                   const Addresses& running_vars, const Addresses& channels,
                                   const std::vector<double>& eps, Address loss) {
    DFQ_RUN(bn_stat_loss, BnStatLoss, static_cast<int64_t>(means.size()), means.data(), vars.data(), running_means.data(),
                                running_vars.data(), channels.data(), eps.data(), nullptr, floats_out(loss), nullptr,
                                nullptr);
  }, Unlocked());

  m.def("fake_quant_conv2d", [](int dtype, int out_dtype, int threads, int64_t count, const std::vector<int32_t>& sides,
                                const std::vector<int32_t>& window, int32_t groups, Address x, Address x_scale,
                                Address weight, Address weight_scale, Address bias, Address out) {
    bool fits = false;
    cpu_kernels().fake_quant_conv2d({dtype, out_dtype, threads, count, sides.at(0), sides.at(1), sides.at(2), sides.at(3),
                                     sides.at(4), sides.at(5), sides.at(6), sides.at(7), window.at(0), window.at(1),
                                     window.at(2), window.at(3), window.at(4), window.at(5), groups, input(x),
                                     floats(x_scale), floats(weight), floats(weight_scale), floats(bias), output(out),
                                     &fits});
    return fits;
  }, Unlocked());

  m.def("bn_stat_loss_backward", [](const Where& where, const Addresses& means, const Addresses& vars, const Addresses& running_means,
                                    const Addresses& running_vars, const Addresses& channels,
                                    const std::vector<double>& eps, Address grad_out, const Addresses& grad_means,
                                    const Addresses& grad_vars) {
    DFQ_RUN(bn_stat_loss, BnStatLoss, static_cast<int64_t>(means.size()), means.data(), vars.data(), running_means.data(),
                                running_vars.data(), channels.data(), eps.data(), floats(grad_out), nullptr,
                                grad_means.data(), grad_vars.data());
  }, Unlocked());
}
