#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <cstring>
#include <deque>

#include "bindings_dlpack.hpp"
#include "common/memory.hpp"
#include "latent/latent.hpp"

namespace urlfast {
namespace {

// The Python object: the process, and views of its memory for each library that asked.
struct LatentDynamics : Latent {
  LatentDynamics(LatentShape shape, LatentParams params, uint64_t seed, Device device, Library caller)
      : Latent(shape, params, seed, device),
        library(caller),
        order(device.cuda ? std::make_shared<DeviceOrder>(device.index) : nullptr) {}
  Library library;  // what reset() returns arrays of
  bool started = false;
  std::array<py::object, 5> views;     // by Library, made at first need
  std::shared_ptr<DeviceOrder> order;  // of what they show, on a device
};

}  // namespace
}  // namespace urlfast
URLFAST_MADE(urlfast::LatentDynamics)
namespace urlfast {
namespace {

std::unique_ptr<LatentDynamics> make(Given<int64_t> num_envs_in, Given<int64_t> latent_dim_in,
                                     Given<int64_t> num_classes_in, Given<double> alpha_in, Given<double> beta_in,
                                     Given<int64_t> episode_length_in, Given<uint64_t> seed, const py::object& device) {
  const int64_t num_envs = num_envs_in.as("num_envs"), latent_dim = latent_dim_in.as("latent_dim"),
                num_classes = num_classes_in.as("num_classes"), episode_length = episode_length_in.as("episode_length");
  const double alpha = alpha_in.as("alpha"), beta = beta_in.as("beta");
  const uint64_t key = seed.as("seed");
  constexpr int64_t kMost = int64_t(1) << 31;
  require(num_envs >= 1 && num_envs <= kMost, "num_envs", "must lie in 1..2^31, got ", num_envs);
  require(latent_dim >= 1 && latent_dim <= kMost, "latent_dim", "must lie in 1..2^31, got ", latent_dim);
  require(num_envs <= (int64_t(1) << 36) / latent_dim, "num_envs", "times latent_dim must be at most 2^36, got ",
          num_envs, " * ", latent_dim);
  require(num_classes >= 1 && num_classes < kMost, "num_classes",
          "must lie in 1..2^31-1 (1 for a generator without classes), got ", num_classes);
  require(alpha >= 0 && alpha <= 1, "alpha", "must lie in [0, 1], got ", alpha);
  require(beta >= 0 && beta <= 1, "beta", "must lie in [0, 1], got ", beta);
  require(episode_length >= 1, "episode_length", "must be at least 1, got ", episode_length);
  const Device where = parse_device(device);
  if (!where.cuda)
    require_room("num_envs", text(num_envs, " x ", latent_dim, " coordinates"),
                 double(num_envs) * (double(latent_dim) * 4 + 10));
  const Library library = py::isinstance<py::str>(device) ? Library::numpy : library_of(device);
  return std::make_unique<LatentDynamics>(LatentShape{num_envs, latent_dim, uint32_t(num_classes), episode_length},
                                          LatentParams{float(alpha), float(beta)}, key, where,
                                          library == Library::torch ? Library::torch : Library::numpy);
}

// A view of the process's memory, which it keeps alive.
template <class T>
py::object view_of(const LatentDynamics& self, Library library, const std::shared_ptr<T>& memory, DType dtype,
                   std::vector<int64_t> shape) {
  if (self.device().cuda) {
    const View view = packed_view(memory.get(), dtype, self.device(), shape);
    const py::object array = py::cast(DeviceArray{view, memory, self.order});
    if (library == Library::torch) return imported("torch").attr("from_dlpack")(array);
    if (library == Library::cupy) return imported("cupy").attr("from_dlpack")(array);
    return array;
  }
  const py::capsule owner(new std::shared_ptr<void>(memory),
                          [](void* p) { delete static_cast<std::shared_ptr<void>*>(p); });
  py::array array(py::dtype(dtype == DType::boolean ? "?" : dtype_name(dtype)), std::move(shape), memory.get(), owner);
  if (library == Library::torch) return imported("torch").attr("from_numpy")(array);
  array.attr("setflags")(py::arg("write") = false);
  return std::move(array);
}

py::object row(LatentDynamics& self, Library library) {
  py::object& known = self.views[int(library)];
  if (!known) {
    const int64_t n = self.shape().num_envs;
    known = py::make_tuple(view_of(self, library, self.z, DType::f32, {n, self.shape().dim}),
                           view_of(self, library, self.classes, DType::i64, {n}),
                           view_of(self, library, self.is_first, DType::boolean, {n}),
                           view_of(self, library, self.is_last, DType::boolean, {n}));
  }
  return known;
}

void advance(LatentDynamics& self, const float* actions, bool reset, CUstream_st* stream) {
  if (self.order) self.order->begin(stream);
  {
    py::gil_scoped_release unlocked;
    self.advance(actions, reset, stream);
  }
  if (self.order) self.order->end(stream);
}

py::object reset(LatentDynamics& self) {
  // Before the first actions the caller's library is not known.
  const Library asked = self.library == Library::numpy ? Library::other : self.library;
  advance(self, nullptr, true, self.device().cuda ? current_stream(asked, self.device().index) : nullptr);
  self.started = true;
  return row(self, self.library);
}

py::object step(LatentDynamics& self, const py::object& actions_in) {
  const Tensor actions(actions_in, "actions");
  actions.require_dtype({DType::f32});
  actions.require_device(self.device(), "the dynamics");
  require(actions.rank == 2 && actions.shape[0] == self.shape().num_envs && actions.shape[1] == self.shape().dim,
          "actions", "must have shape (num_envs, latent_dim) = (", self.shape().num_envs, ", ", self.shape().dim,
          "), got ", actions.shape_text());
  actions.require_contiguous();
  if (!self.started) throw std::runtime_error("LatentDynamics: call reset() before step()");
  advance(self, actions.as<const float>(), false, actions.stream());
  self.library =
      actions.library() == Library::torch || actions.library() == Library::cupy ? actions.library() : Library::numpy;
  return row(self, self.library);
}

py::dict state_dict(const LatentDynamics& self) {
  LatentClock clock;
  const int64_t n = self.shape().num_envs;
  std::string z(size_t(n * self.shape().dim * 4), '\0');
  std::vector<int64_t> classes(n);
  {
    py::gil_scoped_release unlocked;
    self.read(&clock, reinterpret_cast<float*>(z.data()), classes.data());
  }
  py::dict out;
  out["num_envs"] = n;
  out["latent_dim"] = self.shape().dim;
  out["seed"] = self.seed();
  out["rows"] = clock.rows;
  out["t"] = clock.t;
  out["classes"] = classes;
  out["z"] = py::bytes(z);
  return out;
}

void load_state_dict(LatentDynamics& self, Given<py::dict> state_in) {
  const auto state = state_in.as("state");
  const auto as = [&](const char* key, auto kind) {
    return state_item<decltype(kind)>(state, key, "a LatentDynamics'");
  };
  const int64_t n = self.shape().num_envs, dim = self.shape().dim;
  const auto envs = as("num_envs", int64_t()), size = as("latent_dim", int64_t());
  require(envs == n && size == dim, "state", "was saved with (num_envs, latent_dim) = (", envs, ", ", size,
          "), these dynamics have (", n, ", ", dim, ")");
  const auto seed = as("seed", uint64_t());
  require(seed == self.seed(), "state", "was saved with seed ", seed, ", these dynamics have ", self.seed());
  LatentClock clock;
  clock.rows = as("rows", uint64_t()), clock.t = as("t", int64_t());
  require(clock.t >= 0 && clock.t <= self.shape().episode_length, "state", "'t' must lie in 0..",
          self.shape().episode_length, ", the episode's length, got ", clock.t);
  const auto classes = as("classes", std::vector<int64_t>());
  const auto z = as("z", py::bytes());
  const std::string bytes = z;
  require(int64_t(classes.size()) == n && int64_t(bytes.size()) == 4 * n * dim, "state",
          "is damaged: 'classes' or 'z' has the wrong length");
  for (int64_t c : classes)
    require(c >= 0 && c < int64_t(self.shape().classes), "state", "has class ", c, ", these dynamics have ",
            self.shape().classes);
  std::vector<float> values(size_t(n * dim));
  std::memcpy(values.data(), bytes.data(), bytes.size());
  {
    py::gil_scoped_release unlocked;
    self.write(clock, values.data(), classes.data());
  }
  self.started = self.started || clock.rows > 0;
}

// "targets[12]", made once: a call checks some hundred arrays and nearly always has nothing to say.
const char* indexed_name(std::deque<std::string>& names, const char* list, size_t i) {
  while (names.size() <= i) names.push_back(text(list, "[", names.size(), "]"));
  return names[i].c_str();
}

bool same_layout(const View& a, const View& b) {
  for (int i = 0; i < a.rank; ++i)
    if (a.shape[i] != 1 && a.strides[i] != b.strides[i]) return false;
  return true;
}

// Every item of one block of memory exactly once, in whatever order: channels_last weights are so, a slice is not.
bool dense(const View& v) {
  if (v.contiguous()) return true;
  int order[kMaxRank], n = 0;
  for (int i = 0; i < v.rank; ++i)
    if (v.shape[i] != 1) {
      int at = n++;
      for (; at > 0 && v.strides[order[at - 1]] > v.strides[i]; --at) order[at] = order[at - 1];
      order[at] = i;
    }
  int64_t expected = 1;
  for (int i = 0; i < n; expected *= v.shape[order[i++]])
    if (v.strides[order[i]] != expected) return false;
  return true;
}

std::vector<Tensor> tensors(const py::object& list, const char* name, std::deque<std::string>& names) {
  if (py::hasattr(list, "__dlpack__") || py::isinstance<py::str>(list) || py::isinstance<py::dict>(list) ||
      !py::hasattr(list, "__iter__"))
    throw py::type_error(text(name, ": must be a list or another iterable of arrays, got ", type_name(list)));
  std::vector<Tensor> out;
  for (py::handle item : py::iter(list)) out.emplace_back(item, indexed_name(names, name, out.size()));
  return out;
}

void ema_update(const py::object& targets_in, const py::object& sources_in, Given<double> tau_in) {
  static auto &target_names = *new std::deque<std::string>, &source_names = *new std::deque<std::string>;
  const double tau = tau_in.as("tau");
  require(tau >= 0 && tau <= 1, "tau", "must lie in [0, 1], got ", tau);
  const std::vector<Tensor> targets = tensors(targets_in, "targets", target_names);
  const std::vector<Tensor> sources = tensors(sources_in, "sources", source_names);
  require(targets.size() == sources.size(), "sources", "must be as many as targets, ", targets.size(), ", got ",
          sources.size());
  std::vector<EmaPair> pairs;
  pairs.reserve(targets.size());
  for (size_t i = 0; i < targets.size(); ++i) {
    const Tensor &t = targets[i], &s = sources[i];
    t.require_dtype({DType::f16, DType::bf16, DType::f32, DType::f64});
    s.require_dtype({t.dtype});
    t.require_device(targets[0].device, "targets[0]");
    s.require_device(t.device, t.name());
    bool same = t.rank == s.rank;
    for (int axis = 0; same && axis < t.rank; ++axis) same = t.shape[axis] == s.shape[axis];
    require(same, s.name(), "must have the shape of ", t.name(), ", ", t.shape_text(), ", got ", s.shape_text());
    require(dense(t), t.name(), "must be dense (a slice is not); got shape ", t.shape_text(), " with gaps or overlaps");
    require(same_layout(t, s), s.name(), "must lie in memory as ", t.name(), " does; pass both contiguous");
    t.require_writable();
    if (t.numel() > 0) pairs.push_back({t.data, s.data, t.numel(), t.dtype});
  }
  if (pairs.empty()) return;
#ifdef URLFAST_HAS_CUDA
  if (const Device device = targets[0].device; device.cuda) {
    CallStream stream(device);
    for (const Tensor& t : targets) stream.join(t);
    for (const Tensor& s : sources) stream.join(s);
    py::gil_scoped_release unlocked;
    ema_update_cuda(pairs.data(), int64_t(pairs.size()), tau, device.index, stream.begin());
    return stream.end();
  }
#endif
  py::gil_scoped_release unlocked;
  ema_update_cpu(pairs.data(), int64_t(pairs.size()), tau);
}

}  // namespace

void bind_latent(py::module_& m) {
  py::class_<LatentDynamics>(m, "LatentDynamics")
      .def(py::init(&make), py::arg("num_envs"), py::arg("latent_dim"), py::arg("num_classes"), py::arg("alpha"),
           py::arg("beta"), py::arg("episode_length"), py::arg("seed"), py::arg("device"))
      .def("reset", &reset, "Opens an episode in every environment: (z, class, is_first, is_last).")
      .def("step", &step, py::arg("actions"), "The next row of every environment: (z, class, is_first, is_last).")
      .def("state_dict", &state_dict, "The process as ints, a list and bytes; on CUDA this waits for the device.")
      .def("load_state_dict", &load_state_dict, py::arg("state"),
           "Continues from a state_dict of the same sizes and seed.")
      .def_property_readonly("num_envs", [](const LatentDynamics& s) { return s.shape().num_envs; })
      .def_property_readonly("latent_dim", [](const LatentDynamics& s) { return s.shape().dim; })
      .def_property_readonly("num_classes", [](const LatentDynamics& s) { return s.shape().classes; })
      .def_property_readonly("episode_length", [](const LatentDynamics& s) { return s.shape().episode_length; })
      .def_property_readonly("device", [](const LatentDynamics& s) { return s.device().name(); });
  m.def("ema_update_", &ema_update, py::arg("targets"), py::arg("sources"), py::arg("tau"));
}

}  // namespace urlfast
