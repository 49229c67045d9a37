// The extension module. Every Python-visible function lives in bindings*.cpp: checked there, the GIL released,
// dispatched to a device.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <type_traits>

#include "bindings_dlpack.hpp"
#include "common/cpu.hpp"
#include "common/parallel.hpp"

namespace urlfast {

void bind_knn(py::module_& m);
void bind_normalizer(py::module_& m);
void bind_replay(py::module_& m);
void bind_latent(py::module_& m);

static py::dict build_info() {
  std::vector<std::string> compiled, available;
  for (Isa isa : compiled_isas()) compiled.push_back(isa_name(isa));
  for (Isa isa : available_isas()) available.push_back(isa_name(isa));
  const CudaStatus& cuda = cuda_status();
  py::dict info;
  info["compiler"] = URLFAST_COMPILER;
  info["isa_compiled"] = compiled;
  info["isa_available"] = available;
  info["isa"] = isa_name(chosen_isa());
  info["num_threads"] = num_threads();
  info["cuda_compiled"] = cuda.compiled;
  info["cuda_architectures"] = cuda.architectures;
  info["cuda_usable"] = cuda.usable;
  info["cuda_reason"] = cuda.reason;
  info["cuda_runtime"] = cuda.runtime;
  info["cuda_driver"] = cuda.driver;
  return info;
}

// Lets the consumer's stream wait until the array was filled. `stream_in` as the array API standard has it: None or 1
// is the legacy default stream, 2 the thread's own, -1 asks for no waiting.
static void hand_over(const DeviceArray& array, const py::object& stream_in) {
  if (!array.order) return;
  CUstream_st* stream = nullptr;
  if (!stream_in.is_none()) {
    const auto number = Given<int64_t>{stream_in}.as("stream", "None or an int");
    if (number == -1) return;
    if (number != 1) stream = reinterpret_cast<CUstream_st*>(number);
  }
  DeviceOrder& order = *array.order;
  if (cuda_capturing(order.written.device(), stream)) return;
  order.written.order(stream);
  if (stream == order.writer) return;
  // torch's streams live as long as the process, so what it does with the array can be waited for later. Other streams
  // may be gone by then.
  if (torch_on_cuda().is_none() || stream != current_stream(Library::torch, array.view.device.index)) return;
  for (CUstream_st* known : order.readers)
    if (known == stream) return;
  order.readers.push_back(stream);
}

// DLPack for memory of ours on a device, of either generation.
template <class Managed>
static py::capsule export_as(const DeviceArray& array) {
  constexpr bool versioned = std::is_same_v<Managed, dlpack::DLManagedTensorVersioned>;
  static constexpr const char* name = versioned ? "dltensor_versioned" : "dltensor";
  struct Context {
    Managed managed;
    DeviceArray array;
  };
  auto* context = new Context{{}, array};
  Managed& m = context->managed;
  if constexpr (versioned) {
    m.version = {1, 0};
    m.flags = array.view.readonly ? dlpack::kReadOnly : 0;
  }
  m.manager_ctx = context;
  m.deleter = [](Managed* self) { delete static_cast<Context*>(self->manager_ctx); };
  View& view = context->array.view;
  m.dl_tensor = {
      view.data, {dlpack::kCUDA, view.device.index}, view.rank, dtype_to_dlpack(view.dtype), view.shape, view.strides,
      0};
  return py::capsule(&m, name, [](PyObject* capsule) {
    if (!PyCapsule_IsValid(capsule, name)) return;  // consumed: the consumer calls the deleter
    auto* t = static_cast<Managed*>(PyCapsule_GetPointer(capsule, name));
    t->deleter(t);
  });
}

// __dlpack__ as the array API standard has it: who does not name a version it knows understands the first generation.
static py::capsule export_dlpack(const DeviceArray& array, const py::object& stream, const py::object& max_version,
                                 const py::object& dl_device, const py::object& copy) {
  if (!dl_device.is_none() && !dl_device.equal(py::make_tuple(int(dlpack::kCUDA), array.view.device.index)))
    throw py::buffer_error(text("dl_device: the array stays on ", array.view.device.name()));
  if (!copy.is_none() && Given<bool>{copy}.as("copy", "None or a bool"))
    throw py::buffer_error("copy: the array hands out its own memory alone");
  bool versioned = false;
  if (!max_version.is_none()) {
    constexpr const char* kAccepted = "None or a tuple of two ints";
    if (!py::isinstance<py::tuple>(max_version) || py::len(max_version) != 2)
      refuse_type("max_version", kAccepted, max_version);
    versioned = Given<int64_t>{py::tuple(max_version)[0]}.as("max_version", kAccepted) >= 1;
  }
  if (!versioned && array.view.readonly)
    throw py::buffer_error("the array is read-only, which DLPack says from version 1.0 on; pass max_version=(1, 0)");
  hand_over(array, stream);
  return versioned ? export_as<dlpack::DLManagedTensorVersioned>(array) : export_as<dlpack::DLManagedTensor>(array);
}

}  // namespace urlfast

PYBIND11_MODULE(_core, m) {
  using namespace urlfast;
  m.doc() = "urlfast's native core; use it through the functions of `urlfast`.";
  m.attr("__version__") = URLFAST_VERSION;
  m.def("build_info", &build_info, "What was compiled and what this machine can run.");
  m.def("num_threads", &num_threads);
  m.def(
      "set_num_threads",
      [](Given<int64_t> n_in) {
        const int64_t n = n_in.as("n");
        require(n >= 1 && n <= 4096, "n", "must lie in 1..4096, got ", n);
        set_num_threads(int(n));
      },
      py::arg("n"));
  py::class_<DeviceArray>(m, "DeviceArray", "An array on a CUDA device, for any library that speaks DLPack.")
      .def_property_readonly(
          "shape",
          [](const DeviceArray& a) {
            return py::tuple(py::cast(std::vector<int64_t>(a.view.shape, a.view.shape + a.view.rank)));
          })
      .def_property_readonly("dtype", [](const DeviceArray& a) { return dtype_name(a.view.dtype); })
      .def("__dlpack_device__",
           [](const DeviceArray& a) { return py::make_tuple(int(dlpack::kCUDA), a.view.device.index); })
      .def("__dlpack__", &export_dlpack, py::kw_only(), py::arg("stream") = py::none(),
           py::arg("max_version") = py::none(), py::arg("dl_device") = py::none(), py::arg("copy") = py::none())
      .def_property_readonly("__cuda_array_interface__", [](const DeviceArray& a) {
        const auto code = dtype_to_dlpack(a.view.dtype).code;
        if (a.view.dtype == DType::bf16)
          throw py::attribute_error("bfloat16 has no __cuda_array_interface__; use DLPack");
        const char* kind = code == dlpack::kBool   ? "|b"
                           : code == dlpack::kUInt ? "<u"
                           : code == dlpack::kInt  ? "<i"
                                                   : "<f";
        std::vector<int64_t> strides;
        for (int i = 0; i < a.view.rank; ++i) strides.push_back(a.view.strides[i] * item_size(a.view.dtype));
        py::dict out;
        out["shape"] = py::tuple(py::cast(std::vector<int64_t>(a.view.shape, a.view.shape + a.view.rank)));
        out["strides"] = py::tuple(py::cast(strides));
        out["typestr"] = text(kind, item_size(a.view.dtype));
        out["data"] = py::make_tuple(reinterpret_cast<uintptr_t>(a.view.data), a.view.readonly);
        out["version"] = 3;
        if (a.order) out["stream"] = a.order->writer ? reinterpret_cast<uintptr_t>(a.order->writer) : 1;
        return out;
      });
  bind_knn(m);
  bind_normalizer(m);
  bind_replay(m);
  bind_latent(m);
}
