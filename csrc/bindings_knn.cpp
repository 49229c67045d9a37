#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>

#include "bindings_dlpack.hpp"
#include "common/memory.hpp"
#include "knn/episodic.hpp"
#include "knn/knn.hpp"
#include "normalizer/normalizer.hpp"

URLFAST_MADE(urlfast::EpisodicMemory)
URLFAST_MADE(urlfast::Normalizer)

namespace urlfast {
namespace {

// Host integers: a sequence, a NumPy array or a torch tensor on the CPU.
std::vector<int64_t> host_lengths(const py::object& object, int64_t problems, int64_t most) {
  std::vector<int64_t> out;
  if (library_of(object) != Library::other) {
    const Tensor lengths(object, "lengths");
    require(!lengths.device.cuda, "lengths", "must lie on the host (they shape the launch), got ",
            lengths.device.name());
    require(lengths.rank == 1, "lengths", "must have shape (", problems, ",), got ", lengths.shape_text());
    lengths.require_dtype({DType::i64, DType::i32});
    for (int64_t i = 0; i < lengths.shape[0]; ++i)
      out.push_back(lengths.dtype == DType::i64 ? lengths.as<int64_t>()[i * lengths.strides[0]]
                                                : lengths.as<int32_t>()[i * lengths.strides[0]]);
  } else {
    if (!py::isinstance<py::sequence>(object))
      throw py::type_error(text("lengths: must be a sequence of integers, got ", type_name(object)));
    for (py::object item : py::reinterpret_borrow<py::sequence>(object)) {
      if (is_bool(item) || !PyIndex_Check(item.ptr()))
        throw py::type_error(text("lengths: must hold integers, got ", shown(item)));
      out.push_back(Given<int64_t>{item}.as("lengths"));
    }
  }
  require(int64_t(out.size()) == problems, "lengths", "must have one entry for each of the ", problems,
          " memories, got ", out.size());
  for (int64_t n : out) require(n >= 0 && n <= most, "lengths", "must lie in 0..", most, ", got ", n);
  return out;
}

// A checked call: the arrays it borrows and what it asks for.
struct Call {
  Tensor queries;
  std::optional<Tensor> keys;
  std::vector<int64_t> lengths;
  KnnProblem problem;

  bool batched() const { return queries.rank == 3; }
  CallStream stream() const {
    CallStream out(queries.device);
    out.join(queries);
    if (keys) out.join(*keys);
    return out;
  }
  DType result() const { return queries.dtype == DType::f64 ? DType::f64 : DType::f32; }
  std::vector<int64_t> shape(bool with_k) const {
    std::vector<int64_t> out(queries.shape, queries.shape + queries.rank - 1);
    if (with_k) out.push_back(problem.k);
    return out;
  }
};

Call check(const py::object& queries_in, const py::object& keys_in, int64_t k, const py::object& lengths_in,
           bool include_self, const char* queries_name, const char* keys_name) {
  const auto check_array = [](const Tensor& t) {
    t.require_dtype({DType::f16, DType::bf16, DType::f32, DType::f64});
    t.require_contiguous();
  };
  Call call{Tensor(queries_in, queries_name), std::nullopt, {}, {}};
  const Tensor& q = call.queries;
  require(q.rank == 2 || q.rank == 3, queries_name, "must have shape (B, D) or (S, B, D), got ", q.shape_text());
  require(q.numel() > 0, queries_name, "must not be empty, got ", q.shape_text());
  check_array(q);
  KnnProblem& p = call.problem;
  p.queries_name = queries_name, p.keys_name = keys_name;
  p.queries = q.data, p.dtype = q.dtype;
  p.problems = q.rank == 3 ? q.shape[0] : 1, p.num_queries = q.size(-2), p.dim = q.size(-1);
  p.k = k, p.include_self = include_self;
  p.self = keys_in.is_none();
  if (p.self) {
    require(lengths_in.is_none(), "lengths", "needs ", keys_name, " of shape (S, M, D)");
    p.keys = p.queries, p.num_keys = p.num_queries;
    require(k >= 1 && k <= p.num_keys - !include_self, "k", "must lie in 1..", p.num_keys - !include_self,
            " (the rows of ", queries_name, include_self ? "" : " but the row itself", "), got ", k);
  } else {
    call.keys.emplace(keys_in, keys_name);
    const Tensor& m = *call.keys;
    require(include_self, "include_self", "must be True with ", keys_name, ": its rows are not those of ",
            queries_name);
    require(m.rank == q.rank, keys_name, "must have ", q.rank, " axes as ", queries_name, " has, got ", m.shape_text());
    require(m.size(-1) == p.dim, keys_name, "must have ", p.dim, " features as ", queries_name, " has, got ",
            m.shape_text());
    if (q.rank == 3)
      require(m.shape[0] == p.problems, keys_name, "must have ", p.problems, " memories as ", queries_name,
              " has, got ", m.shape_text());
    if (m.dtype != q.dtype)
      throw py::type_error(text(keys_name, ": must have dtype ", dtype_name(q.dtype), " as ", queries_name,
                                " has, got ", dtype_name(m.dtype)));
    check_array(m);
    m.require_device(q.device, queries_name);
    p.keys = m.data, p.num_keys = m.size(-2);
    if (lengths_in.is_none()) {
      require(p.num_keys > 0, keys_name, "must not be empty without lengths, got ", m.shape_text());
      require(k >= 1 && k <= p.num_keys, "k", "must lie in 1..", p.num_keys, " (the rows of ", keys_name, "), got ", k);
    } else {
      require(q.rank == 3, "lengths", "needs ", keys_name, " of shape (S, M, D), got ", m.shape_text());
      require(k >= 1, "k", "must be at least 1, got ", k);
      call.lengths = host_lengths(lengths_in, p.problems, p.num_keys);
      p.lengths = call.lengths.data();
    }
  }
  require(p.num_keys <= int64_t(1) << 31, keys_name, "must have at most 2^31 rows, got ", p.num_keys);
  return call;
}

// A device's allocator says itself whether it has room.
void require_room_on(const Device& device, const char* argument, const std::string& what, double bytes) {
  if (!device.cuda) return require_room(argument, what, bytes);
  constexpr double kMost = 0x1p46;  // and what no device has stays within int64
  if (bytes > kMost)
    throw MemoryShortage(text(argument, ": ", what, " take ", gigabytes(bytes), ": no device has that"));
}

// What a search on a device works in, from the caller's own allocator, which knows the stream and the graph that is
// being captured: it may be let go while the device still works on it. Null on the CPU.
std::optional<Output> make_workspace(const Tensor& like, int64_t bytes) {
  if (!like.device.cuda || bytes == 0) return std::nullopt;
  return output_like(like, DType::u8, {bytes});
}
std::optional<Output> make_workspace(const Call& call) {
#ifdef URLFAST_HAS_CUDA
  const Device& device = call.queries.device;
  if (device.cuda) return make_workspace(call.queries, knn_workspace_cuda(call.problem, device.index));
#endif
  return make_workspace(call.queries, 0);
}
void* data_of(const std::optional<Output>& workspace) { return workspace ? workspace->view.data : nullptr; }

// Where the build has no CUDA no array on a device comes this far.
void run_knn(const Call& call, void* distances, int64_t* indices, [[maybe_unused]] void* workspace) {
#ifdef URLFAST_HAS_CUDA
  const Tensor& q = call.queries;
  if (q.device.cuda) return knn_cuda(call.problem, distances, indices, workspace, q.device.index, q.stream());
#endif
  knn_cpu(call.problem, distances, indices);
}
void run_reward(const Call& call, const KnnReward& reward, void* out, [[maybe_unused]] void* workspace) {
#ifdef URLFAST_HAS_CUDA
  const Tensor& q = call.queries;
  if (q.device.cuda) return knn_reward_cuda(call.problem, reward, out, workspace, q.device.index, q.stream());
#endif
  knn_reward_cpu(call.problem, reward, out);
}

// Two steps with the statistic between them: the kept distances, then what they amount to.
void run_reward(const Call& call, const KnnReward& reward, Normalizer& normalizer, bool update, void* kept,
                int64_t count, void* out, [[maybe_unused]] void* workspace) {
  const KnnProblem& p = call.problem;
  CUstream_st* const stream = call.queries.stream();
#ifdef URLFAST_HAS_CUDA
  const Device& device = call.queries.device;
  if (device.cuda)
    knn_kept_cuda(p, reward, kept, workspace, device.index, stream);
  else
#endif
    knn_kept_cpu(p, reward, kept);
  if (update && count > 0)
    require(normalizer.update(kept, call.result(), count, stream), "normalizer",
            "cannot take distances above 1e150; the statistic has not changed");
  std::unique_lock<std::mutex> lock(normalizer.mutex());
#ifdef URLFAST_HAS_CUDA
  if (device.cuda)
    return knn_finish_cuda(p, reward, kept, normalizer.state(), normalizer.rule(), out, workspace, device.index,
                           stream);
#endif
  const Statistic state = *normalizer.state();
  lock.unlock();
  knn_finish_cpu(p, reward, kept, state, normalizer.rule(), out);
}

py::tuple knn(const py::object& queries, const py::object& keys, Given<int64_t> k, const py::object& lengths,
              Given<bool> include_self) {
  const Call call = check(queries, keys, k.as("k"), lengths, include_self.as("include_self"), "queries", "keys");
  const KnnProblem& p = call.problem;
  require_room_on(call.queries.device, "k",
                  text(p.k, " distances and indices for each of ", p.problems * p.num_queries, " rows"),
                  double(p.problems * p.num_queries) * double(p.k) * double(item_size(call.result()) + 8));
  const Output distances = output_like(call.queries, call.result(), call.shape(true));
  const Output indices = output_like(call.queries, DType::i64, call.shape(true));
  const std::optional<Output> workspace = make_workspace(call);
  CallStream stream = call.stream();
  CUstream_st* const queue = stream.begin();
  {
    const py::gil_scoped_release unlocked;
    run_knn(call, distances.view.data, indices.view.as<int64_t>(), data_of(workspace));
    stream.end();
  }
  return py::make_tuple(distances.result(queue), indices.result(queue));
}

py::object knn_reward(const py::object& z, Given<int64_t> k, const py::object& memory, const py::object& lengths,
                      Given<std::string> reduction_in, Given<double> exponent_in, Given<double> c_in,
                      Given<bool> include_self, const py::object& normalizer_in, Given<bool> update_in) {
  Call call = check(z, memory, k.as("k"), lengths, include_self.as("include_self"), "z", "memory");
  // No memory has more neighbours than rows: what a search takes does not grow with k beyond that.
  if (const KnnProblem& p = call.problem; p.lengths)
    call.problem.k = std::min(p.k, std::max<int64_t>(1, *std::max_element(p.lengths, p.lengths + p.problems)));
  const auto reduction = reduction_in.as("reduction", "'mean' or 'kth'");
  const double exponent = exponent_in.as("exponent"), c = c_in.as("c");
  const bool update_normalizer = update_in.as("update_normalizer");
  require(reduction == "mean" || reduction == "kth", "reduction", "must be 'mean' or 'kth', got '", reduction, "'");
  require(exponent > 0 && std::isfinite(exponent), "exponent", "must be positive and finite, got ", exponent);
  require(c > 0 && std::isfinite(c), "c", "must be positive and finite, got ", c);
  Normalizer* normalizer = nullptr;
  if (!normalizer_in.is_none()) {
    if (!py::isinstance<Normalizer>(normalizer_in))
      throw py::type_error(text("normalizer: must be a RunningNormalizer, got ", type_name(normalizer_in)));
    normalizer = normalizer_in.cast<Normalizer*>();
    require(normalizer->features() == 1, "normalizer", "must have shape (), got ", normalizer->features(), " features");
    require(normalizer->device() == call.queries.device, "normalizer", "must lie on ", call.queries.device.name(),
            " as z does, got ", normalizer->device().name());
  }
  const KnnReward reward{reduction == "kth", exponent, c};
  const Output out = output_like(call.queries, call.result(), call.shape(false));
  const std::optional<Output> workspace = make_workspace(call);
  CallStream stream = call.stream();
  CUstream_st* const queue = stream.begin();
  if (!normalizer) {
    const py::gil_scoped_release unlocked;
    run_reward(call, reward, out.view.data, data_of(workspace));
    stream.end();
  } else {
    int64_t count = 0;
    for (int64_t s = 0; s < call.problem.problems; ++s)
      count += call.problem.num_queries * knn_kept(call.problem, reward, s);
    const Output kept = output_like(call.queries, call.result(), {count});
    const py::gil_scoped_release unlocked;
    run_reward(call, reward, *normalizer, update_normalizer, kept.view.data, count, out.view.data, data_of(workspace));
    stream.end();
  }
  return out.result(queue);
}

std::unique_ptr<EpisodicMemory> make_memory(Given<int64_t> streams_in, Given<int64_t> capacity_in,
                                            Given<int64_t> dim_in, Given<int64_t> k_in, const py::object& device) {
  const int64_t streams = streams_in.as("num_streams"), capacity = capacity_in.as("capacity"), dim = dim_in.as("dim"),
                k = k_in.as("k");
  constexpr int64_t kMost = int64_t(1) << 31;
  require(streams >= 1 && streams < kMost, "num_streams", "must lie in 1..2^31 - 1, got ", streams);
  require(capacity >= 1 && capacity < kMost, "capacity", "must lie in 1..2^31 - 1, got ", capacity);
  require(dim >= 1 && dim < kMost, "dim", "must lie in 1..2^31 - 1, got ", dim);
  require(k >= 1 && k < kMost, "k", "must lie in 1..2^31 - 1, got ", k);
  require(double(streams) * double(capacity) * double(dim) < 0x1p60, "capacity",
          "asks for more than any memory: ", streams, " x ", capacity, " x ", dim, " float32");
  require(double(streams) * double(k) < 0x1p60, "k", "asks for more than any memory: ", streams, " x ", k,
          " distances");
  const Device where = parse_device(device);
  const py::gil_scoped_release unlocked;
  return std::make_unique<EpisodicMemory>(streams, capacity, dim, k, where);
}

py::object step(EpisodicMemory& self, const py::object& embeddings_in, const py::object& reset_in) {
  const Tensor embeddings(embeddings_in, "embeddings"), reset(reset_in, "reset");
  embeddings.require_dtype({DType::f32});
  embeddings.require_device(self.device(), "the memory");
  require(embeddings.rank == 2 && embeddings.shape[0] == self.streams() && embeddings.shape[1] == self.dim(),
          "embeddings", "must have shape (", self.streams(), ", ", self.dim(), "), got ", embeddings.shape_text());
  embeddings.require_contiguous();
  reset.require_dtype({DType::boolean});
  require(reset.rank == 1 && reset.shape[0] == self.streams(), "reset", "must have shape (", self.streams(), ",), got ",
          reset.shape_text());
  reset.require_contiguous();
  if (reset.device.cuda) reset.require_device(self.device(), "the memory");
  require_room_on(self.device(), "k", text(self.k(), " distances for each of ", self.streams(), " streams"),
                  double(self.streams()) * double(self.k()) * 4);
  const Output out = output_like(embeddings, DType::f32, {self.streams(), self.k()});
  const std::optional<Output> workspace = make_workspace(embeddings, self.workspace_bytes());
  CallStream stream(self.device());
  stream.join(embeddings), stream.join(reset);
  CUstream_st* const queue = stream.begin();
  {
    const py::gil_scoped_release unlocked;
    self.step(embeddings.as<float>(), reset.as<bool>(), reset.device.cuda, out.view.as<float>(), data_of(workspace),
              queue);
    stream.end();
  }
  return out.result(queue);
}

py::dict memory_state(const EpisodicMemory& self) {
  for (;;) {
    const std::vector<int64_t> lengths = self.lengths();
    const Output rows =
        numpy_output(DType::f32, {std::accumulate(lengths.begin(), lengths.end(), int64_t(0)), self.dim()});
    bool whole;
    {
      const py::gil_scoped_release unlocked;
      whole = self.save(lengths, rows.view.as<float>());
    }
    if (!whole) continue;  // another thread took a step in between
    py::dict out;
    out["lengths"] = py::cast(lengths);
    out["rows"] = rows.result();
    return out;
  }
}

void load_memory_state(EpisodicMemory& self, Given<py::dict> state_in) {
  const auto state = state_in.as("state");
  for (const char* key : {"lengths", "rows"})
    require(state.contains(key), "state", "has no '", key, "': not an EpisodicMemory's state_dict");
  const std::vector<int64_t> lengths = host_lengths(state["lengths"], self.streams(), self.capacity());
  int64_t held = 0;
  for (int64_t n : lengths) held += n;
  const Tensor rows(state["rows"], "rows");
  rows.require_dtype({DType::f32});
  require(!rows.device.cuda, "rows", "must lie on the host, got ", rows.device.name());
  require(rows.rank == 2 && rows.shape[0] == held && rows.shape[1] == self.dim(), "rows", "must have shape (", held,
          ", ", self.dim(), "), got ", rows.shape_text());
  rows.require_contiguous();
  for (int64_t i = 0; i < rows.numel(); ++i)
    require(std::isfinite(rows.as<float>()[i]), "rows", "must be finite, has NaN or infinity");
  const py::gil_scoped_release unlocked;
  self.load(lengths, rows.as<float>());
}

}  // namespace

void bind_knn(py::module_& m) {
  py::class_<EpisodicMemory>(m, "EpisodicMemory")
      .def(py::init(&make_memory), py::arg("num_streams"), py::arg("capacity"), py::arg("dim"), py::arg("k"),
           py::arg("device"))
      .def("step", &step, py::arg("embeddings"), py::arg("reset"),
           "Distances (num_streams, k) to what each stream holds, ascending, ending in infinity where it holds fewer; "
           "then appends.")
      .def("lengths", &EpisodicMemory::lengths, py::call_guard<py::gil_scoped_release>(),
           "Rows held by each stream; on CUDA this waits for the device.")
      .def("state_dict", &memory_state, "Lengths, and all rows, oldest first (NumPy); on CUDA this waits.")
      .def("load_state_dict", &load_memory_state, py::arg("state"))
      .def_property_readonly("num_streams", &EpisodicMemory::streams)
      .def_property_readonly("capacity", &EpisodicMemory::capacity)
      .def_property_readonly("dim", &EpisodicMemory::dim)
      .def_property_readonly("k", &EpisodicMemory::k)
      .def_property_readonly("device", [](const EpisodicMemory& self) { return self.device().name(); });
  m.def("knn", &knn, py::arg("queries"), py::arg("keys"), py::arg("k"), py::arg("lengths"), py::arg("include_self"));
  m.def("knn_reward", &knn_reward, py::arg("z"), py::arg("k"), py::arg("memory"), py::arg("lengths"),
        py::arg("reduction"), py::arg("exponent"), py::arg("c"), py::arg("include_self"), py::arg("normalizer"),
        py::arg("update_normalizer"));
}

}  // namespace urlfast
