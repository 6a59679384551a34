// Programs in Python: planes and steps as plain attributes, and one call that runs all of it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <mutex>
#include <stdexcept>

#include "cpu/kernels.h"

namespace py = pybind11;
using namespace dfq;

namespace {

// A program and the arenas of its calls: taken by a call, given back after it, so that several threads may call at once.
class Runner {
 public:
  explicit Runner(Program program) : program_(std::move(program)) {
    for (const Step& step : program_.steps) {
      check(step);
      if (step.outs.empty()) reals_ = std::max(reals_, static_cast<size_t>(step.real) + 1);
    }
    cpu_kernels().prepare_program(program_);
  }

  // images: fp32, or where `bytes` says so bytes; reals, inputs, outputs: addresses of all real results, and of what the
  // program's planes of these names hold, all images of a call.
  void run(uintptr_t images, int64_t count, const std::vector<uintptr_t>& reals, int threads, bool bytes,
           const std::vector<uintptr_t>& inputs, const std::vector<uintptr_t>& outputs) {
    if (inputs.size() != program_.inputs.size() || outputs.size() != program_.outputs.size() || reals.size() < reals_)
      throw std::invalid_argument("program: reals, inputs and outputs must be as many as it has");
    if (bytes && program_.pixel_values.empty()) throw std::invalid_argument("program: it does not know what bytes mean");
    std::vector<const uint8_t*> from;
    std::vector<uint8_t*> to;
    std::vector<float*> results;
    for (uintptr_t address : reals) results.push_back(reinterpret_cast<float*>(address));
    for (uintptr_t address : inputs) from.push_back(reinterpret_cast<const uint8_t*>(address));
    for (uintptr_t address : outputs) to.push_back(reinterpret_cast<uint8_t*>(address));
    std::vector<std::unique_ptr<uint8_t[]>> arenas;
    std::vector<uint8_t*> pointers;
    const int needed = count >= threads ? threads : 1;  // few images are worked on by all threads, one after the other
    for (int i = 0; i < needed; ++i) arenas.push_back(take());
    for (const auto& arena : arenas) pointers.push_back(arena.get());
    std::atomic<bool> has_nan{false};
    const auto* floats = bytes ? nullptr : reinterpret_cast<const float*>(images);
    const auto* pixels = bytes ? reinterpret_cast<const uint8_t*>(images) : nullptr;
    cpu_kernels().run_program({&program_, count, floats, pixels, results.data(), from.data(), to.data(), pointers.data(),
                               threads, &has_nan});
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& arena : arenas) free_.push_back(std::move(arena));
    if (has_nan) throw std::invalid_argument("engine: images must be numbers, got NaN");
  }

  // The arena after one image: every plane, in a program whose planes share no memory.
  py::bytes trace(uintptr_t image, const std::vector<uintptr_t>& reals) {
    run(image, 1, reals, 1, false, {}, {});
    const std::lock_guard<std::mutex> lock(mutex_);
    return py::bytes(reinterpret_cast<const char*>(free_.back().get()), static_cast<size_t>(program_.arena_bytes));
  }

 private:
  // Codes that a level takes apart without looking twice.
  static void check(const Step& step) {
    if (step.kind < kQuantize || step.kind > kResize) throw std::invalid_argument("program: no such kind of step");
    if (step.activation < kIdentity || step.activation > kHardSwish)
      throw std::invalid_argument("program: no such activation");
    if (step.outs.size() > kMostOuts || step.chained.size() > kMostChained || step.sources.size() > kMostSources)
      throw std::invalid_argument("program: too many results, chained steps or sources");
    for (const Step& next : step.chained) {
      if (next.kind != kRescale && next.kind != kTable && next.kind != kAdd && next.kind != kMultiply)
        throw std::invalid_argument("program: only rescale, table, add and multiply steps can be chained");
      check(next);
    }
  }

  static constexpr int64_t kSlack = 64;  // a last vector may read beyond its plane

  std::unique_ptr<uint8_t[]> take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (free_.empty()) return std::make_unique<uint8_t[]>(static_cast<size_t>(program_.arena_bytes + kSlack));
    auto arena = std::move(free_.back());
    free_.pop_back();
    return arena;
  }

  Program program_;
  size_t reals_ = 0;  // results that are real
  std::mutex mutex_;
  std::vector<std::unique_ptr<uint8_t[]>> free_;
};

}  // namespace

void bind_programs(py::module_& m) {
#define DFQ_PLAIN(type, name) .def_readwrite(#name, &type::name)
  py::class_<Plane>(m, "Plane")
      .def(py::init<>())
      DFQ_PLAIN(Plane, offset) DFQ_PLAIN(Plane, height) DFQ_PLAIN(Plane, width) DFQ_PLAIN(Plane, channels)
      DFQ_PLAIN(Plane, stride) DFQ_PLAIN(Plane, frame_y) DFQ_PLAIN(Plane, frame_x) DFQ_PLAIN(Plane, scale)
      DFQ_PLAIN(Plane, inverse) DFQ_PLAIN(Plane, zero_point) DFQ_PLAIN(Plane, quant_min) DFQ_PLAIN(Plane, quant_max)
      DFQ_PLAIN(Plane, shift) DFQ_PLAIN(Plane, room) DFQ_PLAIN(Plane, kept)
      .def_property_readonly("bytes", &Plane::bytes);
  py::class_<Step>(m, "Step")
      .def(py::init<>())
      DFQ_PLAIN(Step, kind) DFQ_PLAIN(Step, activation) DFQ_PLAIN(Step, x) DFQ_PLAIN(Step, other) DFQ_PLAIN(Step, outs)
      DFQ_PLAIN(Step, out_height) DFQ_PLAIN(Step, out_width) DFQ_PLAIN(Step, out_channels) DFQ_PLAIN(Step, kernel_y)
      DFQ_PLAIN(Step, kernel_x) DFQ_PLAIN(Step, stride_y) DFQ_PLAIN(Step, stride_x) DFQ_PLAIN(Step, pad_y)
      DFQ_PLAIN(Step, pad_x) DFQ_PLAIN(Step, dilation_y) DFQ_PLAIN(Step, dilation_x) DFQ_PLAIN(Step, groups)
      DFQ_PLAIN(Step, mult) DFQ_PLAIN(Step, bias) DFQ_PLAIN(Step, mean) DFQ_PLAIN(Step, windows)
      DFQ_PLAIN(Step, chained) DFQ_PLAIN(Step, a) DFQ_PLAIN(Step, b) DFQ_PLAIN(Step, real) DFQ_PLAIN(Step, slope)
      DFQ_PLAIN(Step, scale) DFQ_PLAIN(Step, weights) DFQ_PLAIN(Step, values) DFQ_PLAIN(Step, sources)
      DFQ_PLAIN(Step, channels) DFQ_PLAIN(Step, pixels) DFQ_PLAIN(Step, fill)
      .def("set_weight", [](Step& step, uintptr_t address, int64_t count) {
        const auto* from = reinterpret_cast<const int8_t*>(address);
        step.weight.assign(from, from + count);
      })
      .def("set_index", [](Step& step, uintptr_t address, int64_t count) {
        const auto* from = reinterpret_cast<const int32_t*>(address);
        step.index.assign(from, from + count);
      });
  py::class_<Program>(m, "Program")
      .def(py::init<>())
      DFQ_PLAIN(Program, planes) DFQ_PLAIN(Program, steps) DFQ_PLAIN(Program, arena_bytes)
      DFQ_PLAIN(Program, inputs) DFQ_PLAIN(Program, outputs) DFQ_PLAIN(Program, pixel_values)
      DFQ_PLAIN(Program, image_channels) DFQ_PLAIN(Program, image_height) DFQ_PLAIN(Program, image_width);
#undef DFQ_PLAIN
  py::class_<Runner>(m, "Runner")
      .def(py::init<Program>())
      .def("run", &Runner::run, py::arg("images"), py::arg("count"), py::arg("reals"), py::arg("threads"),
           py::arg("bytes") = false, py::arg("inputs") = std::vector<uintptr_t>(), py::arg("outputs") = std::vector<uintptr_t>(),
           py::call_guard<py::gil_scoped_release>())
      .def("trace", &Runner::trace);
}
