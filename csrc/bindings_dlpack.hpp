// Arrays between Python and C++: NumPy through py::array, everything else by DLPack (both generations), nothing copied.
// Results go back in the caller's library, on the caller's device. Included by bindings*.cpp alone.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>  // shapes become tuples: every file must see the same conversions

#include <algorithm>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings_scalars.hpp"
#include "common/check.hpp"
#include "common/cuda.hpp"
#include "common/dlpack.hpp"
#include "common/tensor.hpp"

namespace urlfast {
namespace py = pybind11;

enum class Library { numpy, torch, cupy, jax, other };

// A library's module if the caller has imported it, else none: nothing is ever imported here.
inline py::object imported(const char* name) {
  PyObject* modules = PyImport_GetModuleDict();  // borrowed
  PyObject* module = PyDict_GetItemString(modules, name);
  return module ? py::reinterpret_borrow<py::object>(module) : py::none();
}

// What a Python type says of its arrays.
struct ArrayType {
  Library library = Library::other;
  const dlpack::DLPackExchangeAPI* api = nullptr;  // where it has one
};

inline ArrayType ask_array_type(PyTypeObject* type) {
  const py::handle handle(reinterpret_cast<PyObject*>(type));
  ArrayType out;
  const py::object torch = imported("torch");
  const auto module = py::str(handle.attr("__module__")).cast<std::string>();
  const std::string root = module.substr(0, module.find('.'));
  if (root == "torch")
    out.library = Library::torch;
  else if (root == "cupy")
    out.library = Library::cupy;
  else if (root == "jax" || root == "jaxlib")
    out.library = Library::jax;
  else if (!torch.is_none() && py::hasattr(torch, "Tensor") &&
           PyObject_IsSubclass(handle.ptr(), torch.attr("Tensor").ptr()) == 1)
    out.library = Library::torch;
  // A subclass may have a __dlpack__ of its own, so it does not inherit the table; torch's Parameter is a plain Tensor.
  const bool own = type->tp_dict && PyDict_GetItemString(type->tp_dict, "__dlpack_c_exchange_api__");
  if (own || (root == "torch" && std::string(type->tp_name) == "Parameter")) {
    const py::object capsule = py::getattr(handle, "__dlpack_c_exchange_api__", py::none());
    if (PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) {
      const auto* api =
          static_cast<const dlpack::DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
      while (api && api->header.version.major > 1)
        api = reinterpret_cast<const dlpack::DLPackExchangeAPI*>(api->header.previous);
      if (api && api->header.version.major == 1 && api->from_object && api->current_stream) out.api = api;
    }
  }
  return out;
}

// Asked once per type. The GIL guards the list; it keeps its types alive, so it must not grow without end.
inline ArrayType array_type(py::handle object) {
  static auto& known = *new std::vector<std::pair<PyTypeObject*, ArrayType>>;
  PyTypeObject* type = Py_TYPE(object.ptr());
  for (const auto& [seen, facts] : known)
    if (seen == type) return facts;
  const ArrayType facts = ask_array_type(type);
  if (known.size() < 64) {
    Py_INCREF(type);
    known.emplace_back(type, facts);
  }
  return facts;
}

inline Library library_of(py::handle object) {
  return py::isinstance<py::array>(object) ? Library::numpy : array_type(object).library;
}

// torch, if the caller has it and has used it on a CUDA device; else none.
inline py::object torch_on_cuda() {
  const py::object torch = imported("torch");
  return !torch.is_none() && torch.attr("cuda").attr("is_initialized")().cast<bool>() ? torch : py::none();
}

// What call() returns with `index` as CuPy's current device, which its streams and new arrays belong to.
template <class Call>
py::object on_cupy_device(int index, Call call) {
  const py::object device = imported("cupy").attr("cuda").attr("Device")(index);
  const auto leave = [&] { device.attr("__exit__")(py::none(), py::none(), py::none()); };
  device.attr("__enter__")();
  py::object out;
  try {
    out = call();
  } catch (...) {
    leave();
    throw;
  }
  leave();
  return out;
}

// The stream that the caller's library would launch on now; for an array of no known library, that of the library that
// the caller uses besides. 0 is the legacy default stream.
inline CUstream_st* current_stream(Library library, int device) {
  if (library == Library::other)
    library = !torch_on_cuda().is_none() ? Library::torch : !imported("cupy").is_none() ? Library::cupy : library;
  uintptr_t stream = 0;
  if (library == Library::torch)
    stream = imported("torch").attr("cuda").attr("current_stream")(device).attr("cuda_stream").cast<uintptr_t>();
  else if (library == Library::cupy)
    stream = on_cupy_device(device, [] {
               return imported("cupy").attr("cuda").attr("get_current_stream")().attr("ptr");
             }).cast<uintptr_t>();
  return reinterpret_cast<CUstream_st*>(stream);
}

inline std::optional<DType> dtype_from_dlpack(dlpack::DLDataType t) {
  if (t.lanes != 1) return std::nullopt;
  const int log2 = t.bits == 8 ? 0 : t.bits == 16 ? 1 : t.bits == 32 ? 2 : t.bits == 64 ? 3 : -1;
  if (log2 < 0) return std::nullopt;
  if (t.code == dlpack::kBool && log2 == 0) return DType::boolean;
  if (t.code == dlpack::kUInt) return DType(int(DType::u8) + log2);
  if (t.code == dlpack::kInt) return DType(int(DType::i8) + log2);
  if (t.code == dlpack::kFloat && log2 > 0) return log2 == 1 ? DType::f16 : log2 == 2 ? DType::f32 : DType::f64;
  if (t.code == dlpack::kBfloat && log2 == 1) return DType::bf16;
  return std::nullopt;
}

inline dlpack::DLDataType dtype_to_dlpack(DType d) {
  const uint8_t code = d == DType::boolean ? dlpack::kBool
                       : d <= DType::u64   ? dlpack::kUInt
                       : d <= DType::i64   ? dlpack::kInt
                       : d == DType::bf16  ? dlpack::kBfloat
                                           : dlpack::kFloat;
  return {code, uint8_t(item_size(d) * 8), 1};
}

inline std::optional<DType> dtype_from_name(const std::string& name) {
  for (int i = 0; i <= int(DType::f64); ++i)
    if (name == dtype_name(DType(i))) return DType(i);
  return std::nullopt;
}

// "bool, uint8, ..., float64": what an array may hold at all.
inline std::string known_dtypes(bool numpy = false) {
  std::string names;
  for (int i = 0; i <= int(DType::f64); ++i)
    if (!numpy || DType(i) != DType::bf16) names += text(i ? ", " : "", dtype_name(DType(i)));
  return names;
}

// A borrowed array. Construction checks that it is one; everything else is checked by the function that takes it.
// Must be made and destroyed with the GIL held.
class Tensor : public View {
 public:
  Tensor(py::handle object, const char* argument)
      : name_(argument), library_(library_of(object)), object_(py::reinterpret_borrow<py::object>(object)) {
    if (library_ == Library::numpy)
      from_numpy();
    else
      from_dlpack();
    if (library_ == Library::jax) readonly = true;  // its arrays never change, though it does not say so
  }
  Tensor(Tensor&& other) noexcept
      : View(other),
        name_(other.name_),
        library_(other.library_),
        object_(std::move(other.object_)),
        release_(std::move(other.release_)),
        stream_(other.stream_) {}
  Tensor(const Tensor&) = delete;

  const char* name() const { return name_; }
  Library library() const { return library_; }
  const py::object& object() const { return object_; }
  CUstream_st* stream() const { return stream_; }  // the caller's current one; null on the CPU

  void require_dtype(std::initializer_list<DType> accepted) const {
    std::string names;
    for (DType d : accepted) {
      if (d == dtype) return;
      names += std::string(names.empty() ? "" : ", ") + dtype_name(d);
    }
    throw py::type_error(text(name_, ": must have dtype ", names, ", got ", dtype_name(dtype)));
  }
  void require_contiguous() const {
    require(contiguous(), name_, "must be C-contiguous; pass ",
            library_ == Library::torch  ? text(name_, ".contiguous()")
            : library_ == Library::cupy ? text("cupy.ascontiguousarray(", name_, ")")
                                        : text("np.ascontiguousarray(", name_, ")"));
  }
  void require_writable() const { require(!readonly, name_, "must be writable, got a read-only array"); }
  void require_device(const Device& expected, const char* of) const {
    require(device == expected, name_, "must lie on ", expected.name(), " as ", of, " does, got ", device.name());
  }

 private:
  void from_numpy() {
    const auto array = py::reinterpret_borrow<py::array>(object_);
    const py::dtype type = array.dtype();
    const int bits = int(8 * type.itemsize());
    const char kind = type.kind();
    std::optional<DType> known;  // by kind and size: a dtype's name takes NumPy microseconds
    if (kind == 'f' || kind == 'i' || kind == 'u' || kind == 'b')
      known = dtype_from_dlpack({uint8_t(kind == 'f'   ? dlpack::kFloat
                                         : kind == 'i' ? dlpack::kInt
                                         : kind == 'u' ? dlpack::kUInt
                                                       : dlpack::kBool),
                                 uint8_t(bits), 1});
    else if (kind == 'V' && bits == 16)  // ml_dtypes' bfloat16
      known = dtype_from_name(py::str(type.attr("name")).cast<std::string>());
    if (!known)
      throw py::type_error(text(name_, ": must have one of the dtypes ", known_dtypes(), ", got ",
                                py::str(type.attr("name")).cast<std::string>()));
    dtype = *known;
    if (const char order = type.byteorder(); order == '>' || order == '<') {  // native is '=' or '|'
      if (!type.attr("isnative").cast<bool>()) throw py::type_error(text(name_, ": must have native byte order"));
    }
    require(array.ndim() <= kMaxRank, name_, "must have at most ", kMaxRank, " axes, got ", array.ndim());
    rank = int(array.ndim());
    data = const_cast<void*>(array.data());
    readonly = !array.writeable();
    for (int i = 0; i < rank; ++i) {
      shape[i] = array.shape(i);
      require(array.strides(i) % array.itemsize() == 0, name_, "must have strides that are whole items");
      strides[i] = array.strides(i) / array.itemsize();
    }
    require(reinterpret_cast<uintptr_t>(data) % uintptr_t(item_size(dtype)) == 0, name_,
            "must be aligned to its items; pass ", name_, ".copy()");
  }

  void from_dlpack() {
    if (const auto* api = array_type(object_).api) {
      dlpack::DLManagedTensorVersioned* managed = nullptr;
      if (api->from_object(object_.ptr(), &managed) != 0) {
        const py::error_already_set error;
        refuse_sharing(error);
      }
      own(managed);
      if (device.cuda) {
        require_cuda(name_, device.index);
        void* stream = nullptr;
        if (api->current_stream(dlpack::kCUDA, device.index, &stream) != 0) throw py::error_already_set();
        stream_ = static_cast<CUstream_st*>(stream);
      }
      return;
    }
    if (!py::hasattr(object_, "__dlpack__") || !py::hasattr(object_, "__dlpack_device__"))
      throw py::type_error(text(name_,
                                ": must be an array (NumPy, torch, CuPy, JAX, or anything with __dlpack__), got ",
                                type_name(object_)));
    const py::object where = asked([&] { return object_.attr("__dlpack_device__")(); });
    const auto number = [&](int i) {
      return int(Given<int64_t>{py::tuple(where)[i]}.as(name_, "an array whose __dlpack_device__ is two ints"));
    };
    if (!py::isinstance<py::tuple>(where) || py::len(where) != 2)
      refuse_type(name_, "an array whose __dlpack_device__ is two ints", where);
    take_device({number(0), number(1)});
    py::dict arguments;
    if (device.cuda) {
      require_cuda(name_, device.index);
      stream_ = current_stream(library_, device.index);
      arguments["stream"] =
          stream_ ? reinterpret_cast<uintptr_t>(stream_) : 1;  // DLPack: 1 is the legacy default stream, 0 is forbidden
    }
    py::object capsule;
    try {
      py::dict versioned(**arguments);
      versioned["max_version"] = py::make_tuple(1, 0);
      capsule = object_.attr("__dlpack__")(**versioned);
    } catch (py::error_already_set& error) {
      if (!error.matches(PyExc_TypeError)) refuse_sharing(error);
      capsule = asked([&] { return object_.attr("__dlpack__")(**arguments); });  // older than DLPack 1.0
    }
    if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned")) {
      auto* managed =
          static_cast<dlpack::DLManagedTensorVersioned*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned"));
      PyCapsule_SetName(capsule.ptr(), "used_dltensor_versioned");
      own(managed);
    } else if (PyCapsule_IsValid(capsule.ptr(), "dltensor")) {
      auto* managed = static_cast<dlpack::DLManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
      PyCapsule_SetName(capsule.ptr(), "used_dltensor");
      release_ = {managed, [](void* m) {
                    auto* t = static_cast<dlpack::DLManagedTensor*>(m);
                    if (t->deleter) t->deleter(t);
                  }};
      take(managed->dl_tensor);
    } else {
      throw py::type_error(text(name_, ": __dlpack__ must return a DLPack capsule"));
    }
  }

  [[noreturn]] void refuse_sharing(const py::error_already_set& error) const {
    throw py::type_error(text(name_, ": cannot be shared: ", first_line(error.what())));
  }

  template <class Call>
  py::object asked(Call call) const {
    try {
      return call();
    } catch (const py::error_already_set& error) {
      refuse_sharing(error);
    }
  }

  void own(dlpack::DLManagedTensorVersioned* managed) {
    release_ = {managed, [](void* m) {
                  auto* t = static_cast<dlpack::DLManagedTensorVersioned*>(m);
                  if (t->deleter) t->deleter(t);
                }};
    require(managed->version.major == 1, name_, "speaks DLPack ", managed->version.major, ", only 0 and 1 are known");
    readonly = managed->flags & dlpack::kReadOnly;
    take(managed->dl_tensor);
  }

  void take_device(dlpack::DLDevice where) {
    const int type = where.device_type;
    if (type == dlpack::kCUDA || type == dlpack::kCUDAManaged)
      device = {true, where.device_id};
    else if (type != dlpack::kCPU && type != dlpack::kCUDAHost)
      throw py::type_error(text(name_, ": must lie on the CPU or a CUDA device, got DLPack device type ", type));
  }

  void take(const dlpack::DLTensor& t) {
    take_device(t.device);
    const auto known = dtype_from_dlpack(t.dtype);
    if (!known)
      throw py::type_error(text(name_, ": must have one of the dtypes ", known_dtypes(), ", got DLPack type code ",
                                int(t.dtype.code), " with ", int(t.dtype.bits), " bits"));
    dtype = *known;
    require(t.ndim <= kMaxRank, name_, "must have at most ", kMaxRank, " axes, got ", t.ndim);
    rank = t.ndim;
    data = static_cast<char*>(t.data) + t.byte_offset;
    int64_t packed = 1;
    for (int i = rank - 1; i >= 0; --i) {
      shape[i] = t.shape[i];
      strides[i] = t.strides ? t.strides[i] : packed;
      packed *= t.shape[i];
    }
  }

  const char* name_;
  Library library_;
  py::object object_;  // keeps a NumPy array alive
  std::unique_ptr<void, void (*)(void*)> release_{nullptr, [](void*) {}};
  CUstream_st* stream_ = nullptr;
};

// Arrays of one call that lie on a device: the stream to work on, the first one's, and the others that it takes part
// in: two libraries may each have their own. With the GIL or without.
class CallStream {
 public:
  explicit CallStream(Device device) : device_(device) {}
  void join(const Tensor& array) {
    if (!array.device.cuda) return;
    if (!chosen_) stream_ = array.stream(), chosen_ = true;
    if (array.stream() != stream_ && std::find(others_.begin(), others_.end(), array.stream()) == others_.end())
      others_.push_back(array.stream());
  }
  // What was queued on the other streams comes before the call's work.
  CUstream_st* begin() {
    if (!device_.cuda) return nullptr;
    if (!chosen_) stream_ = current_stream(Library::other, device_.index), chosen_ = true;
    order(others_, {stream_});
    return stream_;
  }
  // And that before what is queued there from now on: memory that is freed may be used again.
  void end() {
    if (!others_.empty()) order({stream_}, others_);
  }

 private:
  void order(const std::vector<CUstream_st*>& before, const std::vector<CUstream_st*>& after) {
    for (CUstream_st* b : before) {
      CudaEvent event(device_.index);
      event.record(b);
      for (CUstream_st* a : after) event.order(a);
    }
  }
  Device device_;
  CUstream_st* stream_ = nullptr;
  bool chosen_ = false;
  std::vector<CUstream_st*> others_;
};

// When the work that fills a device's memory is done, and who reads it. Used with the GIL held. A graph's work is in
// the order of who replays it: an event of a capture means nothing outside.
struct DeviceOrder {
  explicit DeviceOrder(int device) : written(device) {}
  // Before the memory is filled on `stream`: who filled it before and other streams that were given it come first.
  void begin(CUstream_st* stream) {
    if ((stream == writer && readers.empty()) || cuda_capturing(written.device(), stream)) return;
    written.order(stream);
    for (CUstream_st* reader : readers) {
      CudaEvent event(written.device());
      event.record(reader);
      event.order(stream);
    }
    readers.clear();
  }
  // And after.
  void end(CUstream_st* stream) {
    writer = stream;
    if (!cuda_capturing(written.device(), stream)) written.record(stream);
  }
  CudaEvent written;
  CUstream_st* writer = nullptr;      // the stream it was filled on
  std::vector<CUstream_st*> readers;  // other streams that it was handed to
};

// Memory on a CUDA device that Python sees through DLPack and __cuda_array_interface__: what replay hands out, and what
// callers without an allocator of their own get. `owner` keeps the memory alive. `order` is null where the memory
// belongs to the caller, who knows what fills it.
struct DeviceArray {
  View view;
  std::shared_ptr<void> owner;
  std::shared_ptr<DeviceOrder> order{};
};

// An output of the native core: where to write, and what the caller gets once it is written.
struct Output {
  py::object made;
  View view;
  bool to_jax = false;
  std::shared_ptr<DeviceOrder> order{};  // of device memory of ours

  // After the work was done, or launched on `stream`: JAX copies what it finds at an address that does not suit it.
  py::object result(CUstream_st* stream = nullptr) const {
    if (order) order->end(stream);
    return to_jax ? imported("jax").attr("dlpack").attr("from_dlpack")(made) : made;
  }
};

inline View packed_view(void* data, DType dtype, Device device, const std::vector<int64_t>& shape) {
  View view;
  view.data = data, view.dtype = dtype, view.device = device, view.rank = int(shape.size());
  int64_t packed = 1;
  for (int i = view.rank - 1; i >= 0; --i) view.shape[i] = shape[i], view.strides[i] = packed, packed *= shape[i];
  return view;
}

inline Output numpy_output(DType dtype, const std::vector<int64_t>& shape) {
  if (dtype == DType::bf16) throw py::type_error("NumPy has no bfloat16");
  const py::dtype type = dtype == DType::f32   ? py::dtype::of<float>()  // a dtype from its name costs more
                         : dtype == DType::i64 ? py::dtype::of<int64_t>()
                                               : py::dtype(dtype == DType::boolean ? "?" : dtype_name(dtype));
  py::array array(type, std::vector<py::ssize_t>(shape.begin(), shape.end()));
  return {array, packed_view(array.mutable_data(), dtype, {}, shape)};
}

// A fresh array like `input`: same library, same device. torch and CuPy allocate their own (their caching allocators
// know the current stream); JAX and others take memory of ours.
inline Output output_like(const Tensor& input, DType dtype, const std::vector<int64_t>& shape) {
  const bool jax = input.library() == Library::jax;
  const char* name = dtype == DType::boolean ? "bool" : dtype_name(dtype);
  if (input.library() == Library::torch) {
    const py::tuple size = py::cast(shape);
    const py::object make = input.object().attr("new_empty");  // on the input's device
    const py::object made =
        input.dtype == dtype ? make(size) : make(size, py::arg("dtype") = imported("torch").attr(name));
    void* data = reinterpret_cast<void*>(made.attr("data_ptr")().cast<uintptr_t>());
    return {made, packed_view(data, dtype, input.device, shape)};
  }
  if (input.library() == Library::cupy) {
    const py::object made = on_cupy_device(
        input.device.index, [&] { return imported("cupy").attr("empty")(py::tuple(py::cast(shape)), py::str(name)); });
    void* data = reinterpret_cast<void*>(made.attr("data").attr("ptr").cast<uintptr_t>());
    return {made, packed_view(data, dtype, input.device, shape)};
  }
  if (!input.device.cuda) {
    Output out = numpy_output(dtype, shape);
    out.to_jax = jax;
    return out;
  }
  View view = packed_view(nullptr, dtype, input.device, shape);
  DeviceArray array{view, cuda_buffer(input.device.index, view.numel() * item_size(dtype)),
                    std::make_shared<DeviceOrder>(input.device.index)};
  array.view.data = view.data = array.owner.get();
  const std::shared_ptr<DeviceOrder> order = array.order;
  return {py::cast(std::move(array)), view, jax, order};
}

// "cpu", "cuda", "cuda:1", a torch.device, or an index-less cuda device (0). Checked: a CUDA device is usable when this
// returns.
inline Device parse_device(py::handle object, const char* argument = "device") {
  const auto name = Given<std::string>{py::str(object)}.as(argument, "'cpu', 'cuda' or 'cuda:N'");
  if (name == "cpu") return {};
  const bool cuda = name == "cuda" || (name.rfind("cuda:", 0) == 0 && name.size() > 5 && name.size() < 9 &&
                                       name.find_first_not_of("0123456789", 5) == std::string::npos);
  require(cuda, argument, "must be 'cpu', 'cuda' or 'cuda:N', got '", name, "'");
  const Device device{true, name.size() > 5 ? std::stoi(name.substr(5)) : 0};
  require_cuda(argument, device.index);
  return device;
}

}  // namespace urlfast
