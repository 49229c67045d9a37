// The extension module. Every Python-visible function lives in bindings*.cpp: checked there, the GIL released,
// dispatched to a device.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

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

// DLPack for memory of ours on a device. The consumer's stream is made to see finished work by a synchronisation only
// when it differs from the legacy default stream, which orders itself after every blocking stream.
static py::capsule export_dlpack(const DeviceArray& array) {
  struct Context {
    dlpack::DLManagedTensorVersioned managed;
    DeviceArray array;
  };
  auto* context = new Context{{}, array};
  auto& m = context->managed;
  m.version = {1, 0};
  m.manager_ctx = context;
  m.deleter = [](dlpack::DLManagedTensorVersioned* self) { delete static_cast<Context*>(self->manager_ctx); };
  m.flags = array.view.readonly ? dlpack::kReadOnly : 0;
  View& view = context->array.view;
  m.dl_tensor = {
      view.data, {dlpack::kCUDA, view.device.index}, view.rank, dtype_to_dlpack(view.dtype), view.shape, view.strides,
      0};
  return py::capsule(&m, "dltensor_versioned", [](PyObject* capsule) {
    if (!PyCapsule_IsValid(capsule, "dltensor_versioned")) return;  // consumed: the consumer calls the deleter
    auto* t = static_cast<dlpack::DLManagedTensorVersioned*>(PyCapsule_GetPointer(capsule, "dltensor_versioned"));
    t->deleter(t);
  });
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
      [](int n) {
        require(n >= 1 && n <= 4096, "n", "must lie in 1..4096, got ", n);
        set_num_threads(n);
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
      .def("__dlpack__", [](const DeviceArray& a, const py::kwargs&) { return export_dlpack(a); })
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
        return out;
      });
  bind_knn(m);
  bind_normalizer(m);
  bind_replay(m);
  bind_latent(m);
}
