// Whole calls, from tensors to tensors: what the Python of the most frequent operators does for the plain case, in one C
// function, because behind cold caches the interpreter takes longer than a kernel on a small tensor (docs/LOG.md).
//
// Each function gives None wherever the case is not plain: then Python looks again, and says what is wrong if something
// is. Plain: nobody watches (dispatch modes, transforms, tracing, profiler), every tensor is a torch.Tensor, not negated by
// a flag, dense, all of it in memory and of a type that kernels know. A public function gives (what the operator's forward
// gives, whether autograd must record it); what only a backward needs is None where nothing is recorded.
#include <pybind11/pybind11.h>

#include "common/exchange.h"
#include "run.h"

namespace py = pybind11;
using namespace dfq;

namespace {

using Object = py::object;
using Arguments = PyObject* const*;

Object taken(PyObject* made) {
  if (!made) throw py::error_already_set();
  return py::reinterpret_steal<Object>(made);
}
Object call(PyObject* function) { return taken(PyObject_CallNoArgs(function)); }
Object method(PyObject* object, PyObject* name) { return taken(PyObject_CallMethodNoArgs(object, name)); }
bool truth(const Object& value) {
  const int answer = PyObject_IsTrue(value.ptr());
  if (answer < 0) throw py::error_already_set();
  return answer == 1;
}
int64_t integer(PyObject* value) {
  const int64_t found = PyLong_AsLongLong(value);
  if (found == -1 && PyErr_Occurred()) throw py::error_already_set();
  return found;
}

// What is used of torch; given once by attach() and never released.
struct Torch {
  const ExchangeTable* table = nullptr;
  PyTypeObject *tensor, *parameter;
  PyObject *empty_like, *float32, *uint8, *num_threads, *grad_enabled, *forward_level, *watchers;
  PyObject *requires_grad, *is_neg, *new_empty, *untyped_storage, *nbytes, *storage_offset, *level, *dtype;  // names
} torch;

struct Seen {
  ExchangedTensor at;
  int64_t size;
  int dtype;  // -1: none that kernels compute with
};

bool nobody_watches() {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(torch.watchers); ++i)
    if (truth(call(PyTuple_GET_ITEM(torch.watchers, i)))) return false;
  return true;
}

// Whether sizes of more than 1 have these strides: of the last axis 1, of each one before as much as the next one spans.
bool in_order(const ExchangedTensor& t, const int* axes, int dims) {
  int64_t expected = 1;
  for (int i = dims - 1; i >= 0; --i) {
    if (t.shape[axes[i]] != 1 && t.strides[axes[i]] != expected) return false;
    expected *= t.shape[axes[i]];
  }
  return true;
}

bool dense(const ExchangedTensor& t) {
  constexpr int kMost = 8;
  constexpr int contiguous[kMost] = {0, 1, 2, 3, 4, 5, 6, 7}, channels_last[] = {0, 2, 3, 1};
  return t.dims <= kMost && (in_order(t, contiguous, t.dims) || (t.dims == 4 && in_order(t, channels_last, 4)));
}

int dtype_of(const ExchangedTensor& t) {
  if (t.type_code == kFloatCode && t.bits == 32) return kFloat32;
  if (t.type_code == kFloatCode && t.bits == 16) return kFloat16;
  return t.type_code == kBFloatCode && t.bits == 16 ? kBFloat16 : -1;
}

// Whether `object` is a plain tensor with elements.
bool look(PyObject* object, Seen& seen) {
  if (Py_TYPE(object) != torch.tensor && Py_TYPE(object) != torch.parameter) return false;
  ExchangedTensor& t = seen.at;
  if (torch.table->look(object, &t) != 0) return PyErr_Clear(), false;
  if (!t.data || t.lanes != 1 || (t.device_type != kCpuDevice && (t.device_type != kCudaDevice || !cuda_kernels())))
    return false;
  if (!dense(t) || truth(method(object, torch.is_neg))) return false;
  t.data += t.byte_offset;
  seen.size = 1;
  for (int i = 0; i < t.dims; ++i) seen.size *= t.shape[i];
  seen.dtype = dtype_of(t);
  // a storage can be freed or shrunk behind a tensor's back
  const int64_t held = integer(method(method(object, torch.untyped_storage).ptr(), torch.nbytes).ptr());
  const int64_t before = integer(method(object, torch.storage_offset).ptr());
  return seen.size > 0 && held >= (before + seen.size) * (t.bits / 8);
}

bool together(const Seen& x, const Seen& other) {
  return x.at.device_type == other.at.device_type && x.at.device == other.at.device;
}

// An fp32 tensor of `size` numbers beside x: one axis, or none for one number.
bool look_parameter(PyObject* object, const Seen& x, int64_t size, bool per_channel, Seen& seen) {
  return look(object, seen) && together(x, seen) && seen.dtype == kFloat32 && seen.size == size &&
         (!per_channel || seen.at.dims == 1);
}

// Whether autograd must see a call with these arguments.
bool recorded(Arguments arguments, int tensors) {
  if (integer(PyDict_GetItem(torch.forward_level, torch.level)) >= 0) return true;
  if (!truth(call(torch.grad_enabled))) return false;
  for (int i = 0; i < tensors; ++i)
    if (truth(taken(PyObject_GetAttr(arguments[i], torch.requires_grad)))) return true;
  return false;
}

Object empty_like(PyObject* x) { return taken(PyObject_CallOneArg(torch.empty_like, x)); }

void* address(const Object& made) {
  ExchangedTensor t;
  if (torch.table->look(made.ptr(), &t) != 0) throw py::error_already_set();
  return t.data + t.byte_offset;
}

// Room for `size` numbers on the device of x; `at`: where it is.
Object room(PyObject* x, int64_t size, PyObject* dtype, void** at) {
  const Object count = taken(PyLong_FromLongLong(size));
  PyObject* const arguments[] = {x, count.ptr(), dtype};
  Object made = taken(PyObject_VectorcallMethod(torch.new_empty, arguments, 2, torch.dtype));
  *at = address(made);
  return made;
}

template <class Kernel, class CudaKernel, class Of>
void run_unlocked(const Queue& queue, Kernel cpu, CudaKernel cuda, const Of& arguments) {
  const py::gil_scoped_release unlocked;
  run<Of>(queue, cpu, cuda, arguments);
}
#define DFQ_RUN(queue, name, arguments) run_unlocked(queue, &CpuKernels::name, &CudaKernels::name, arguments)

int threads() { return static_cast<int>(integer(call(torch.num_threads).ptr())); }

// Where a kernel on x runs.
Queue queue_of(const Seen& x, void* workspace = nullptr) {
  if (x.at.device_type == kCpuDevice) return {kEmulated ? 0 : -1, nullptr, workspace};
  void* stream = nullptr;
  if (torch.table->current_stream(kCudaDevice, x.at.device, &stream) != 0) throw py::error_already_set();
  return {x.at.device, stream, workspace};
}

bool exact_integer(PyObject* value, int64_t limit, int64_t& to) {
  if (!PyLong_CheckExact(value)) return false;
  int overflow = 0;
  to = PyLong_AsLongLongAndOverflow(value, &overflow);
  return !overflow && -limit <= to && to <= limit;
}

constexpr int64_t kQuantLimit = 1 << 23;  // _checks.py
int64_t mask_bytes(int64_t size) { return (size + 15) / 16 * 2; }

// x, scale, zero_point, quant_min, quant_max, axis
struct FakeQuantCall {
  Seen x, scale, zero_point;
  View view;
  int64_t low, high;

  bool read(Arguments a, Py_ssize_t count) {
    if (count != 6 || !nobody_watches() || !look(a[0], x) || x.dtype < 0) return false;
    if (!exact_integer(a[3], kQuantLimit, low) || !exact_integer(a[4], kQuantLimit, high) || low >= high) return false;
    view = {x.size, 1, x.size};
    const bool per_channel = a[5] != Py_None;
    int64_t channels = 1;
    if (per_channel) {
      int64_t axis;
      if (!exact_integer(a[5], x.at.dims, axis) || axis == x.at.dims) return false;
      if (axis < 0) axis += x.at.dims;
      channels = x.at.shape[axis];
      if (channels > 1) view = {x.size, channels, x.at.strides[axis]};
    }
    return look_parameter(a[1], x, channels, per_channel, scale) && look_parameter(a[2], x, channels, per_channel, zero_point);
  }

  void run_into(void* out, void* mask) const {
    const FakeQuantForward arguments{x.dtype, threads(), view, x.at.data, reinterpret_cast<const float*>(scale.at.data),
                                     reinterpret_cast<const float*>(zero_point.at.data), static_cast<float>(low),
                                     static_cast<float>(high), out, static_cast<uint8_t*>(mask)};
    DFQ_RUN(queue_of(x), fake_quant_forward, arguments);
  }
};

// The public function without its backend.
Object fake_quant(Arguments a, Py_ssize_t count) {
  FakeQuantCall of;
  if (!of.read(a, count)) return py::none();
  const bool record = recorded(a, 3);
  void* bits = nullptr;
  const Object out = empty_like(a[0]), inside = record ? room(a[0], mask_bytes(of.x.size), torch.uint8, &bits) : py::none();
  of.run_into(address(out), bits);
  return py::make_tuple(py::make_tuple(out, inside), record);
}

// grad_out, inside, stride -> grad_x: dfq_kernels/fake_quant/native.py, backward; strides other than grad_out's are not
// plain.
Object mask_backward(Arguments a, Py_ssize_t count) {
  Seen grad_out, inside;
  if (count != 3 || !nobody_watches() || !look(a[0], grad_out) || !look(a[1], inside) || grad_out.dtype < 0) return py::none();
  if (!together(grad_out, inside) || inside.at.type_code != kUnsignedCode || inside.at.bits != 8) return py::none();
  if (inside.size < mask_bytes(grad_out.size) || !PyTuple_Check(a[2]) || PyTuple_GET_SIZE(a[2]) != grad_out.at.dims)
    return py::none();
  for (int i = 0; i < grad_out.at.dims; ++i)
    if (integer(PyTuple_GET_ITEM(a[2], i)) != grad_out.at.strides[i]) return py::none();
  const Object grad_x = empty_like(a[0]);
  const MaskBackward arguments{grad_out.dtype, threads(), grad_out.size, grad_out.at.data,
                               reinterpret_cast<const uint8_t*>(inside.at.data), address(grad_x)};
  DFQ_RUN(queue_of(grad_out), mask_backward, arguments);
  return grad_x;
}

// The public function without its backend.
Object bn_stats(Arguments a, Py_ssize_t count) {
  Seen x;
  if (count != 1 || !nobody_watches() || !look(a[0], x) || x.dtype < 0 || x.at.dims < 2) return py::none();
  const int64_t channels = x.at.shape[1];
  const View view = channels == 1 ? View{x.size, 1, x.size} : View{x.size, channels, x.at.strides[1]};
  void *mean_at = nullptr, *var_at = nullptr, *workspace = nullptr;
  const Object mean = room(a[0], channels, torch.float32, &mean_at), var = room(a[0], channels, torch.float32, &var_at);
  Object sums;
  if (kEmulated || x.at.device_type == kCudaDevice)
    sums = room(a[0], cuda_kernels()->workspace_bytes(view), torch.uint8, &workspace);
  const BnStatsForward arguments{x.dtype, threads(), view, x.at.data, static_cast<float*>(mean_at), static_cast<float*>(var_at)};
  DFQ_RUN(queue_of(x, workspace), bn_stats_forward, arguments);
  return py::make_tuple(py::make_tuple(mean, var), recorded(a, 1));
}

// Whether torch's table can be used; torch: the module; forward_ad: where its level is; watchers: functions whose answers
// are false while nobody watches.
bool attach(py::object exchange, py::module_ module, py::dict forward_ad, py::tuple watchers) {
  if (!PyCapsule_IsValid(exchange.ptr(), "dlpack_exchange_api")) return false;
  auto* table = static_cast<const ExchangeTable*>(PyCapsule_GetPointer(exchange.ptr(), "dlpack_exchange_api"));
  while (table && table->major > 1) table = table->older;
  if (!table || table->major != 1 || !table->look || !table->current_stream) return false;
  if (!forward_ad.contains("_current_level")) return false;
  const auto kept = [](Object object) { return object.release().ptr(); };
  const auto of = [&](const char* name) { return kept(module.attr(name)); };
  const auto name = [](const char* text) { return PyUnicode_InternFromString(text); };
  torch.tensor = reinterpret_cast<PyTypeObject*>(of("Tensor"));
  torch.parameter = reinterpret_cast<PyTypeObject*>(kept(module.attr("nn").attr("Parameter")));
  torch.empty_like = of("empty_like"), torch.float32 = of("float32"), torch.uint8 = of("uint8");
  torch.num_threads = of("get_num_threads"), torch.grad_enabled = of("is_grad_enabled");
  torch.forward_level = kept(forward_ad), torch.watchers = kept(watchers);
  torch.requires_grad = name("requires_grad"), torch.is_neg = name("is_neg"), torch.new_empty = name("new_empty");
  torch.untyped_storage = name("untyped_storage"), torch.nbytes = name("nbytes");
  torch.storage_offset = name("storage_offset"), torch.level = name("_current_level");
  torch.dtype = kept(py::make_tuple("dtype"));
  torch.table = table;
  return true;
}

// Without pybind11's dispatch, which would cost as much as what it calls.
template <Object (*function)(Arguments, Py_ssize_t)>
PyObject* guarded(PyObject*, Arguments arguments, Py_ssize_t count) noexcept {
  try {
    return function(arguments, count).release().ptr();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

#define DFQ_CALL(name) {#name, reinterpret_cast<PyCFunction>(&guarded<name>), METH_FASTCALL, nullptr}
PyMethodDef kCalls[] = {DFQ_CALL(fake_quant), DFQ_CALL(mask_backward), DFQ_CALL(bn_stats), {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_calls(py::module_& m) {
  py::module_ calls = m.def_submodule("calls");
  calls.def("attach", &attach);
  if (PyModule_AddFunctions(calls.ptr(), kCalls) != 0) throw py::error_already_set();
}
