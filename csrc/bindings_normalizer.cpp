#include <pybind11/stl.h>

#include <cmath>

#include "bindings_dlpack.hpp"
#include "common/memory.hpp"
#include "normalizer/normalizer.hpp"

namespace urlfast {
namespace {

constexpr const char* kModes[] = {"mean", "std", "var", "ema_abs"};

// The Python object: a Normalizer and the shape of its statistics.
struct RunningNormalizer : Normalizer {
  RunningNormalizer(StatisticRule rule, std::vector<int64_t> of, int64_t features, Device where)
      : Normalizer(rule, features, where), shape(std::move(of)) {}
  std::vector<int64_t> shape;
  std::string mode() const { return kModes[int(rule().mode)]; }
};

}  // namespace
}  // namespace urlfast
URLFAST_MADE(urlfast::Normalizer)
URLFAST_MADE(urlfast::RunningNormalizer)
namespace urlfast {
namespace {

std::string shape_text(const std::vector<int64_t>& shape) {
  View view;
  view.rank = int(shape.size());
  for (int i = 0; i < view.rank; ++i) view.shape[i] = shape[i];
  return view.shape_text();
}

// A shape: a tuple or list of ints, or one alone.
std::vector<int64_t> sizes(const py::object& object, const char* argument) {
  constexpr const char* kAccepted = "an int or a tuple of ints";
  if (!py::isinstance<py::tuple>(object) && !py::isinstance<py::list>(object))
    return {Given<int64_t>{object}.as(argument, kAccepted)};
  std::vector<int64_t> out;
  for (py::handle item : object) out.push_back(Given<int64_t>{item}.as(argument, kAccepted));
  return out;
}

std::unique_ptr<RunningNormalizer> make(Given<std::string> mode_in, const py::object& shape_in,
                                        Given<double> epsilon_in, std::optional<Given<double>> clip_in,
                                        Given<double> momentum_in, const py::object& device) {
  const auto mode = mode_in.as("mode", "'mean', 'std', 'var' or 'ema_abs'");
  const std::vector<int64_t> shape = sizes(shape_in, "shape");
  const double epsilon = epsilon_in.as("epsilon"), momentum = momentum_in.as("momentum");
  std::optional<double> clip;
  if (clip_in) clip = clip_in->as("clip", "None or a number");
  StatisticRule rule;
  int found = -1;
  for (int i = 0; i < 4; ++i)
    if (mode == kModes[i]) found = i;
  require(found >= 0, "mode", "must be 'mean', 'std', 'var' or 'ema_abs', got '", mode, "'");
  rule.mode = StatisticMode(found);
  int64_t features = 1;
  require(shape.size() < kMaxRank, "shape", "must have at most ", kMaxRank - 1, " axes, got ", shape.size());
  for (int64_t n : shape) {
    require(n > 0 && n <= (int64_t(1) << 28), "shape", "must hold positive sizes, got ", shape_text(shape));
    features *= n;
    require(features <= (int64_t(1) << 28), "shape", "must have at most 2^28 features, got ", shape_text(shape));
  }
  require(std::isfinite(epsilon) && epsilon >= 0, "epsilon", "must be finite and not negative, got ", epsilon);
  require(!clip || (std::isfinite(*clip) && *clip >= 0), "clip", "must be None, or finite and not negative, got ",
          clip.value_or(0));
  require(momentum >= 0 && momentum < 1, "momentum", "must lie in [0, 1), got ", momentum);
  rule.epsilon = epsilon, rule.clip = clip.value_or(-1), rule.momentum = momentum;
  const Device where = parse_device(device);
  if (!where.cuda)
    require_room("shape", text(features, " features"), 2. * double(features) * double(sizeof(Statistic)));
  py::gil_scoped_release unlocked;
  return std::make_unique<RunningNormalizer>(rule, shape, features, where);
}

// Rows of x, checked.
int64_t rows_of(const RunningNormalizer& self, const Tensor& x) {
  x.require_dtype({DType::f16, DType::bf16, DType::f32, DType::f64});
  x.require_device(self.device(), "the normalizer");
  x.require_contiguous();
  const int rank = int(self.shape.size());
  bool fits = x.rank >= rank;
  for (int i = 0; fits && i < rank; ++i) fits = x.shape[x.rank - rank + i] == self.shape[i];
  require(fits, "x", "must end in the normalizer's shape ", shape_text(self.shape), ", got ", x.shape_text());
  const int64_t n = x.numel();
  require(n > 0, "x", "must not be empty, got ", x.shape_text());
  return n / self.features();
}

void update_with(RunningNormalizer& self, const Tensor& x, int64_t rows) {
  bool ok;
  {
    py::gil_scoped_release unlocked;
    ok = self.update(x.data, x.dtype, rows, x.stream());
  }
  require(ok, "x", "must be finite (and below 1e150 in size); the statistic has not changed");
}

// Where normalized values go: fresh memory, or what the caller gave, which takes part in the call's `stream`.
Output normalized_like(const Tensor& x, const py::object& out, CallStream& stream) {
  const DType dtype = x.dtype == DType::f64 ? DType::f64 : DType::f32;
  if (out.is_none()) return output_like(x, dtype, {x.shape, x.shape + x.rank});
  const Tensor to(out, "out");
  to.require_dtype({dtype});
  to.require_device(x.device, "x");
  to.require_contiguous();
  to.require_writable();
  bool same = to.rank == x.rank;
  for (int i = 0; same && i < x.rank; ++i) same = to.shape[i] == x.shape[i];
  require(same, "out", "must have x's shape ", x.shape_text(), ", got ", to.shape_text());
  const auto begin = [](const View& v) { return reinterpret_cast<uintptr_t>(v.data); };
  const auto end = [&](const View& v) { return begin(v) + uintptr_t(v.numel() * item_size(v.dtype)); };
  require((begin(to) == begin(x) && to.dtype == x.dtype) || end(to) <= begin(x) || end(x) <= begin(to), "out",
          "must be x itself or share no memory with it");
  stream.join(to);
  return {out, to};
}

py::object normalized(const RunningNormalizer& self, const Tensor& x, int64_t rows, const Output& to,
                      CallStream& stream) {
  CUstream_st* const queue = stream.begin();
  {
    py::gil_scoped_release unlocked;
    self.normalize(x.data, x.dtype, rows, to.view.data, queue);
    stream.end();
  }
  return to.result(queue);
}
CallStream stream_of(const Tensor& x) {
  CallStream stream(x.device);
  stream.join(x);
  return stream;
}

py::object call(RunningNormalizer& self, const py::object& x_in, const py::object& out) {
  const Tensor x(x_in, "x");
  const int64_t rows = rows_of(self, x);
  CallStream stream = stream_of(x);
  const Output to = normalized_like(x, out, stream);  // refused before the statistic changes
  update_with(self, x, rows);
  return normalized(self, x, rows, to, stream);
}

std::vector<Statistic> read(const RunningNormalizer& self) {
  py::gil_scoped_release unlocked;
  std::vector<Statistic> state(self.features());
  self.read(state.data());
  return state;
}

py::dict state_dict(const RunningNormalizer& self) {
  const std::vector<Statistic> state = read(self);
  py::list mean, m2;
  for (const Statistic& s : state) mean.append(s.mean), m2.append(s.m2);
  py::dict out;
  out["mode"] = self.mode();
  out["shape"] = py::cast(self.shape);
  out["count"] = state[0].count;
  out["mean"] = mean;
  out["m2"] = m2;
  return out;
}

void load_state_dict(RunningNormalizer& self, Given<py::dict> state_in) {
  const auto state = state_in.as("state");
  const auto as = [&](const char* key, auto kind) {
    return state_item<decltype(kind)>(state, key, "a RunningNormalizer's");
  };
  const auto mode = as("mode", std::string());
  require(mode == self.mode(), "state", "was saved with mode '", mode, "', this one has '", self.mode(), "'");
  const auto shape = as("shape", std::vector<int64_t>());
  require(shape == self.shape, "state", "was saved with another shape than this one's ", shape_text(self.shape));
  const auto count = as("count", 0.);
  const auto mean = as("mean", std::vector<double>()), m2 = as("m2", std::vector<double>());
  const bool sizes = int64_t(mean.size()) == self.features() && int64_t(m2.size()) == self.features();
  require(sizes && std::isfinite(count) && count >= 0, "state", "is damaged: 'count', 'mean' or 'm2' is wrong");
  std::vector<Statistic> values(self.features());
  for (size_t f = 0; f < values.size(); ++f) {
    require(std::isfinite(mean[f]) && std::isfinite(m2[f]) && m2[f] >= 0, "state", "holds a value that is not finite");
    values[f].count = count, values[f].mean = mean[f], values[f].m2 = m2[f];
  }
  py::gil_scoped_release unlocked;
  self.write(values.data());
}

void merge(RunningNormalizer& self, const py::object& other_in) {
  if (!py::isinstance<RunningNormalizer>(other_in)) refuse_type("other", "a RunningNormalizer", other_in);
  const auto& other = other_in.cast<const RunningNormalizer&>();
  require(self.rule().mode != StatisticMode::ema_abs, "other", "cannot be merged: an 'ema_abs' average has an order");
  require(other.rule().mode == self.rule().mode, "other", "must have mode '", self.mode(), "', got '", other.mode(),
          "'");
  require(other.shape == self.shape, "other", "must have shape ", shape_text(self.shape), ", got ",
          shape_text(other.shape));
  CUstream_st* stream = self.device().cuda ? current_stream(Library::other, self.device().index) : nullptr;
  bool ok;
  {
    py::gil_scoped_release unlocked;
    ok = self.merge(other, stream);
  }
  require(ok, "other", "has seen too much: the sum would not be finite; the statistic has not changed");
}

py::object scale(const RunningNormalizer& self) {
  const std::vector<Statistic> state = read(self);
  py::array_t<double> out(std::vector<py::ssize_t>(self.shape.begin(), self.shape.end()));
  for (size_t f = 0; f < state.size(); ++f) out.mutable_data()[f] = statistic_scale(state[f], self.rule());
  return out[py::tuple(0)];  // a NumPy scalar where shape is ()
}

}  // namespace

void bind_normalizer(py::module_& m) {
  py::class_<Normalizer>(m, "Normalizer", "What knn_reward needs of a RunningNormalizer.");
  py::class_<RunningNormalizer, Normalizer>(m, "RunningNormalizer")
      .def(py::init(&make), py::arg("mode"), py::arg("shape"), py::arg("epsilon"), py::arg("clip"), py::arg("momentum"),
           py::arg("device"))
      .def(
          "update",
          [](RunningNormalizer& self, const py::object& x_in) {
            const Tensor x(x_in, "x");
            update_with(self, x, rows_of(self, x));
          },
          py::arg("x"), "Takes the values of x (..., *shape) into the statistic.")
      .def(
          "normalize",
          [](const RunningNormalizer& self, const py::object& x_in, const py::object& out) {
            const Tensor x(x_in, "x");
            const int64_t rows = rows_of(self, x);
            CallStream stream = stream_of(x);
            const Output to = normalized_like(x, out, stream);
            return normalized(self, x, rows, to, stream);
          },
          py::arg("x"), py::kw_only(), py::arg("out") = py::none(),
          "x (..., *shape) divided by the statistic, which does not change; into `out` where one is given, which may "
          "be "
          "x.")
      .def("__call__", &call, py::arg("x"), py::kw_only(), py::arg("out") = py::none(),
           "update(x), then normalize(x, out=out).")
      .def("merge", &merge, py::arg("other"), "Takes what another normalizer of the same mode and shape has seen.")
      .def("state_dict", &state_dict, "The statistic as floats, strings and lists; on CUDA this waits for the device.")
      .def("load_state_dict", &load_state_dict, py::arg("state"),
           "Continues from a state_dict of the same mode and shape.")
      .def_property_readonly("mode", &RunningNormalizer::mode)
      .def_property_readonly("shape", [](const RunningNormalizer& s) { return py::tuple(py::cast(s.shape)); })
      .def_property_readonly("epsilon", [](const RunningNormalizer& s) { return s.rule().epsilon; })
      .def_property_readonly("clip",
                             [](const RunningNormalizer& s) {
                               return s.rule().clip < 0 ? py::object(py::none()) : py::cast(s.rule().clip);
                             })
      .def_property_readonly("momentum", [](const RunningNormalizer& s) { return s.rule().momentum; })
      .def_property_readonly("device", [](const RunningNormalizer& s) { return s.device().name(); })
      .def_property_readonly(
          "scale", &scale,
          "What values are divided by now, float64 of shape `shape`; on CUDA this waits for the device.");
}

}  // namespace urlfast
