#include <pybind11/stl.h>

#include <cmath>
#include <set>

#include "bindings_dlpack.hpp"
#include "common/memory.hpp"
#include "replay/replay.hpp"
#include "replay/replay_storage.hpp"

namespace urlfast {
namespace {

constexpr int64_t kMaxRows = (int64_t(1) << 31) - 1;
constexpr double kMostBytes = 0x1p45;  // of a replay or a batch: less than an address space has

// Where one batch goes: arrays, and their memory in the order of replay_layout.
struct ReplayBuffers {
  std::weak_ptr<Replay> owner;
  int64_t batch = 0;
  std::vector<void*> pointers;
  py::dict arrays;
  std::shared_ptr<DeviceOrder> order;  // of device memory of ours
  std::optional<CallStream> stream;    // of the caller's
  bool pinned = false;                 // host memory that a device may be copying from,
  std::shared_ptr<CudaEvent> copied;   // and has when this has passed
};

int64_t bytes_of(const ReplayOutput& output) {
  int64_t bytes = item_size(output.dtype);
  for (int64_t d : output.shape) bytes *= d;
  return bytes;
}

bool dtype_is(const py::array& array, DType dtype) {  // dtype.name, which Tensor asks for, costs more than a row's copy
  const py::dtype type = array.dtype();
  const char order = type.byteorder();
  const char kind = dtype == DType::boolean ? 'b' : dtype <= DType::u64 ? 'u' : dtype <= DType::i64 ? 'i' : 'f';
  return type.kind() == kind && type.itemsize() == item_size(dtype) && (order == '=' || order == '|');
}

// One column of rows: [count, ...shape], each row contiguous, whatever lies between rows.
class Column {
 public:
  // on: the replay's device, where it may lie besides the CPU.
  Column(py::handle object, const char* name, DType dtype, const std::vector<int64_t>& shape, int64_t count, Device on,
         CallStream& stream) {
    View view;
    if (py::isinstance<py::array>(object) && dtype_is(py::reinterpret_borrow<py::array>(object), dtype)) {
      const auto array = py::reinterpret_borrow<py::array>(object);
      owner_ = array;
      view.data = const_cast<void*>(array.data());
      view.rank = int(std::min<py::ssize_t>(array.ndim(), kMaxRank));
      for (int i = 0; i < view.rank; ++i) {
        require(array.strides(i) % array.itemsize() == 0, name, "must have strides that are whole items");
        view.shape[i] = array.shape(i), view.strides[i] = array.strides(i) / array.itemsize();
      }
      if (array.ndim() > kMaxRank) view.rank = -1;
    } else {
      held_.emplace(object, name);
      held_->require_dtype({dtype});
      require(!held_->device.cuda || held_->device == on, name, "must lie on the CPU",
              on.cuda ? " or on " + on.name() : "", ", got ", held_->device.name());
      stream.join(*held_);
      view = *held_;
    }
    bool fits = view.rank == int(shape.size()) + 1 && (count < 0 || view.shape[0] == count);
    for (size_t i = 0; fits && i < shape.size(); ++i) fits = view.shape[i + 1] == shape[i];
    if (!fits) {
      std::string wanted = count < 0 ? "(n" : text("(", count);
      for (int64_t d : shape) wanted += text(", ", d);
      require(false, name, "must have shape ", wanted, shape.empty() ? ",)" : ")", ", got ",
              view.rank < 0 ? std::string("more axes") : view.shape_text());
    }
    int64_t packed = 1;
    for (int i = view.rank - 1; i >= 1; --i) {
      require(view.shape[i] == 1 || view.strides[i] == packed || view.shape[0] == 0, name,
              "must have C-contiguous rows; pass np.ascontiguousarray(", name, ")");
      packed *= view.shape[i];
    }
    require(reinterpret_cast<uintptr_t>(view.data) % uintptr_t(item_size(dtype)) == 0, name,
            "must be aligned to its items; pass ", name, ".copy()");
    count_ = view.shape[0];
    column_ = {view.data, view.strides[0] * item_size(dtype), view.device.cuda};
  }
  int64_t count() const { return count_; }
  ReplayColumn rows() const { return column_; }
  void require_device(Device device, const char* name) const {
    require(column_.on_device == device.cuda, name, "must lie on ", device.name(), " as the replay does, got ",
            Device{column_.on_device, device.index}.name());
  }

 private:
  std::optional<Tensor> held_;  // keeps what came by DLPack
  py::object owner_;            // or from NumPy: another thread may take it out of the dict while the work is done
  ReplayColumn column_;
  int64_t count_ = 0;
};

class PyReplay {
 public:
  using FieldTuple = std::tuple<std::string, std::vector<int64_t>, std::string, int64_t>;  // name, shape, dtype, every

  PyReplay(int64_t capacity, const std::vector<FieldTuple>& fields, int64_t num_streams,
           std::optional<int64_t> sequence_length, int64_t stride, int64_t burn_in, std::optional<int64_t> n_step,
           std::optional<double> gamma, std::optional<int64_t> frame_stack, bool cross_episodes,
           double priority_exponent, double importance_exponent, double eta, const std::string& storage,
           const std::string& path, py::handle device, uint64_t seed, int64_t expected_rows) {
    require(capacity >= 1 && capacity <= kMaxRows, "capacity", "must lie in 1..", kMaxRows, ", got ", capacity);
    require(num_streams >= 1 && num_streams <= capacity, "num_streams", "must lie in 1..", capacity,
            " (the capacity), got ", num_streams);
    ReplayConfig c;
    c.shape.streams = num_streams;
    c.shape.rows = capacity / num_streams;
    require(n_step.has_value() != sequence_length.has_value(), "sequence_length",
            "give either sequence_length or n_step");
    if (n_step) {
      require(*n_step >= 1 && *n_step <= kMaxRows, "n_step", "must be at least 1, got ", *n_step);
      require(gamma.has_value(), "gamma", "must be given with n_step");
      require(*gamma >= 0 && *gamma <= 1, "gamma", "must lie in 0..1, got ", *gamma);
      require(stride == 1, "stride", "is for sequences; with n_step every transition is sampled, got ", stride);
      require(burn_in == 0, "burn_in", "is for sequences; with n_step it must be 0, got ", burn_in);
      require(!cross_episodes, "cross_episodes", "is for sequences; n-step windows stop at an episode's end");
      c.shape.n_step = *n_step;
      c.gamma = *gamma;
    } else {
      require(!gamma, "gamma", "is for n_step; sequences hand out rewards as they came");
      require(burn_in >= 0 && burn_in <= kMaxRows, "burn_in", "must not be negative, got ", burn_in);
      require(*sequence_length >= burn_in + 2 && *sequence_length <= kMaxRows, "sequence_length", "must be at least ",
              burn_in + 2, " (burn_in, a transition's row, and a last one to bootstrap from), got ", *sequence_length);
      require(stride >= 1 && stride <= kMaxRows, "stride", "must be at least 1, got ", stride);
      c.shape.length = *sequence_length;
      c.shape.stride = stride;
      c.shape.burn_in = burn_in;
      c.shape.cross_episodes = cross_episodes;
    }
    if (frame_stack) {
      require(*frame_stack >= 1 && *frame_stack <= 256, "frame_stack", "must lie in 1..256, got ", *frame_stack);
      require(!cross_episodes, "frame_stack",
              "cannot go with cross_episodes: one frame would need two stacks where an episode begins");
      c.shape.stack = *frame_stack;
    }
    const int64_t window = (n_step ? *n_step : *sequence_length) + c.shape.stack;
    require(c.shape.rows >= window, "capacity", "must be at least ", window * num_streams, " (", num_streams,
            " streams of one window with its frame stack), got ", capacity);
    std::set<std::string> names{"reward", "terminated", "is_first",    "is_last",  "priority", "mask", "indices",
                                "weight", "steps",      "probability", "discount", "frames",   "keys"};
    for (const auto& [name, shape, dtype, every] : fields) {
      require(names.insert(name).second, "fields", "'", name, "' is a name the replay uses itself, or stands twice");
      ReplayField field;
      field.name = name;
      const auto known = dtype_from_name(dtype);
      require(known && *known != DType::bf16, "fields", "'", name, "' must have one of the dtypes ", known_dtypes(true),
              ", got ", dtype);
      field.dtype = *known;
      field.shape = shape;
      for (int64_t d : shape) require(d >= 1, "fields", "'", name, "' must have a shape of positive lengths, got ", d);
      require(shape.size() <= 5, "fields", "'", name, "' must have at most 5 axes, got ", shape.size());
      require(field.bytes() <= double(int64_t(1) << 40), "fields", "'", name, "' takes more than 2^40 bytes a row");
      if (c.shape.stride == 1)
        require(every == 1, "fields", "'", name, "' must have every=1 ",
                n_step ? "(another is for sequences)" : "(the stride is 1)", ", got ", every);
      require(every == 1 || every == c.shape.stride, "fields", "'", name,
              "' must have every=1 or every=", c.shape.stride,
              " (the stride: what is kept at sequence starts only), got ", every);
      field.at_starts = every > 1;
      if (name == "observation") {
        require(every == 1, "fields", "'observation' must have every=1");
        c.observation = int(c.fields.size());
        require(!frame_stack || !shape.empty(), "fields", "'observation' must have an axis for frame_stack to stack");
        names.insert("next_observation");
      }
      c.fields.push_back(field);
    }
    double row_bytes = 0;
    for (const ReplayField& f : c.fields) row_bytes += f.bytes();
    if (double(capacity) * row_bytes > kMostBytes)  // what the rows take below stays within int64
      throw MemoryShortage(
          text("capacity: ", capacity, " rows of ", gigabytes(row_bytes), " are more than any memory"));
    require(c.observation >= 0 || !n_step, "fields",
            "must have 'observation' with n_step, whose batches hold it twice");
    require(c.observation >= 0 || !frame_stack, "fields", "must have 'observation' with frame_stack");
    require(priority_exponent >= 0 && priority_exponent <= 100, "priority_exponent", "must lie in 0..100, got ",
            priority_exponent);
    c.priority_exponent = priority_exponent;
    c.importance_exponent = importance_exponent;
    require(importance_exponent >= 0 && importance_exponent <= 1, "importance_exponent", "must lie in 0..1, got ",
            importance_exponent);
    require(eta >= 0 && eta <= 1, "eta", "must lie in 0..1, got ", eta);
    c.eta = eta;
    require(storage == "memory" || storage == "file", "storage", "must be 'memory' or 'file', got '", storage, "'");
    c.file = storage == "file";
    c.path = path;
    c.seed = seed;
    c.expected_rows = expected_rows;
    c.device = parse_device(device);
    require(!c.file || !c.device.cuda, "storage", "must be 'memory' with device='", c.device.name(), "'");
    py::gil_scoped_release unlocked;
#ifdef URLFAST_HAS_CUDA
    if (c.device.cuda) {
      replay_ = make_replay_cuda(std::move(c));
      return;
    }
#endif
    replay_ = make_replay_cpu(std::move(c));
  }

  void close() {
    std::shared_ptr<Replay> last;
    last.swap(replay_);
    py::gil_scoped_release unlocked;  // unmapping takes its time; a thread still inside keeps its own reference
    last.reset();
  }

  void add(Given<py::dict> rows_in, py::object streams) {
    const auto replay = alive();
    const auto rows = rows_in.as("rows", "a dict of str to arrays");
    const ReplayConfig& config = replay->config();
    std::vector<Column> columns;
    columns.reserve(config.fields.size() + 5);
    ReplayRows out;
    std::optional<Tensor> named;
    int64_t count = config.shape.streams;
    if (!streams.is_none()) {
      named.emplace(streams, "streams");
      named->require_dtype({DType::i64});
      require(named->rank == 1 && !named->device.cuda, "streams", "must be one-dimensional and on the CPU, got shape ",
              named->shape_text());
      named->require_contiguous();
      count = named->size(0);
      out.streams = named->as<int64_t>();
    }
    out.count = count;
    size_t used = 0;
    CallStream stream(config.device);
    auto column = [&](const char* name, DType dtype, const std::vector<int64_t>& shape, bool is_flag = false) {
      PyObject* value = PyDict_GetItemString(rows.ptr(), name);  // borrowed
      require(value, "rows", "must have '", name, "'");
      ++used;
      // which windows exist is worked out on the host, without waiting for a device
      columns.emplace_back(py::handle(value), name, dtype, shape, count, is_flag ? Device{} : config.device, stream);
      return columns.back().rows();
    };
    static const std::vector<int64_t> scalar;
    for (const ReplayField& f : config.fields) out.fields.push_back(column(f.name.c_str(), f.dtype, f.shape));
    out.reward = column("reward", DType::f32, scalar);
    out.terminated = column("terminated", DType::boolean, scalar, true);
    out.is_first = column("is_first", DType::boolean, scalar, true);
    out.is_last = column("is_last", DType::boolean, scalar, true);
    if (rows.contains("priority")) {
      require(config.priority_exponent > 0, "priority", "is for a replay with priority_exponent > 0");
      out.priority = column("priority", DType::f32, scalar);
    }
    if (used != rows.size()) refuse_unknown(rows, config);
    // one would spoil the targets of every window it lies in
    for (int64_t i = 0; !out.reward.on_device && i < count; ++i)
      require(!std::isnan(*out.reward.row<float>(i)), "reward", "must not be NaN, got NaN in row ", i);
    CUstream_st* queue = stream.begin();
    py::gil_scoped_release unlocked;
    replay->add(out, queue);
    stream.end();
  }

  std::shared_ptr<ReplayBuffers> empty(int64_t batch) {
    const auto replay = alive();
    check_batch(batch);
    auto buffers = std::make_shared<ReplayBuffers>();
    buffers->owner = replay;
    buffers->batch = batch;
    const Device device = replay->config().device;
    const auto layout = checked_layout(replay->config(), batch);
    if (device.cuda) {
      int64_t all = 0;
      for (const ReplayOutput& o : layout) all += (bytes_of(o) + 255) & ~int64_t(255);
      const std::shared_ptr<void> memory = cuda_buffer(device.index, all);
      buffers->order = std::make_shared<DeviceOrder>(device.index);
      char* next = static_cast<char*>(memory.get());
      for (const ReplayOutput& o : layout) {
        const View view = packed_view(next, o.dtype, device, o.shape);
        next += (bytes_of(o) + 255) & ~int64_t(255);
        buffers->pointers.push_back(view.data);
        buffers->arrays[py::str(o.name)] = py::cast(DeviceArray{view, memory, buffers->order});
      }
      return buffers;
    }
    double wanted = 0;
    for (const ReplayOutput& o : layout) wanted += double(bytes_of(o));
    require_room("B", text(batch, " items of this replay"), wanted);
    // Where torch uses a GPU, batches are pinned: it copies them without waiting.
    const bool pin = cuda_status().compiled && !torch_on_cuda().is_none() && cuda_status().usable;
    for (const ReplayOutput& o : layout) {
      const py::dtype type(o.dtype == DType::boolean ? "?" : dtype_name(o.dtype));
      void* data = pin ? cuda_allocate_host(bytes_of(o)) : nullptr;
      py::capsule owner;
      if (data) {
        buffers->pinned = true;
        owner = py::capsule(data, [](void* p) { cuda_free_host(p); });
      } else {
        auto* pages = new Pages(bytes_of(o));
        data = pages->data();
        owner = py::capsule(pages, [](void* p) { delete static_cast<Pages*>(p); });
      }
      py::array array(type, std::vector<py::ssize_t>(o.shape.begin(), o.shape.end()), data, owner);
      buffers->pointers.push_back(data);
      buffers->arrays[py::str(o.name)] = array;
    }
    return buffers;
  }

  // Stacks of a device's single frames [B, L + stack - 1, ...] as a strided view [B, L, stack, ...] of them.
  static DeviceArray stacks(const py::object& frames, int64_t stack) {
    DeviceArray out;
    if (py::isinstance<DeviceArray>(frames)) {
      out = frames.cast<DeviceArray>();
    } else {
      out.view = Tensor(frames, "frames");
      out.owner = {new py::object(frames), [](void* p) {
                     const py::gil_scoped_acquire locked;
                     delete static_cast<py::object*>(p);
                   }};
    }
    View& view = out.view;
    require(view.rank >= 3 && view.device.cuda && stack >= 1 && stack <= view.shape[1], "stack",
            "must be at most the frames that there are, got ", stack);
    view.shape[1] -= stack - 1;
    view.shape[2] *= stack;
    return out;
  }

  std::shared_ptr<ReplayBuffers> into(int64_t batch, const py::dict& arrays) {
    const auto replay = alive();
    check_batch(batch);
    auto buffers = std::make_shared<ReplayBuffers>();
    buffers->owner = replay;
    buffers->batch = batch;
    const auto layout = checked_layout(replay->config(), batch);
    buffers->stream.emplace(replay->config().device);
    for (const ReplayOutput& o : layout) {
      const std::string name = "out['" + o.name + "']";
      require(arrays.contains(py::str(o.name)), "out", "must have '", o.name, "'; replay.layout(B) lists all of them");
      const py::object object = arrays[py::str(o.name)];
      const Device device = replay->config().device;
      if (!device.cuda && !py::isinstance<py::array>(object)) throw py::type_error(name + ": must be a NumPy array");
      const Tensor t(object, name.c_str());
      t.require_device(device, "the replay");
      buffers->stream->join(t);
      t.require_dtype({o.dtype});
      t.require_contiguous();
      t.require_writable();
      bool fits = t.rank == int(o.shape.size());
      for (int i = 0; fits && i < t.rank; ++i) fits = t.shape[i] == o.shape[size_t(i)];
      const View wanted = packed_view(nullptr, o.dtype, device, o.shape);
      require(fits, name.c_str(), "must have shape ", wanted.shape_text(), ", got ", t.shape_text());
      buffers->pointers.push_back(t.data);
      buffers->arrays[py::str(o.name)] = object;
    }
    require(arrays.size() == layout.size(), "out", "must have the arrays of replay.layout(B) alone, got ",
            arrays.size(), " where there are ", layout.size());
    return buffers;
  }

  void sample(const std::shared_ptr<ReplayBuffers>& buffers) {
    const auto replay = alive();
    require(buffers->owner.lock() == replay, "out", "must be made by this replay");
    const Device device = replay->config().device;
    if (device.cuda) return sample_on_device(*replay, *buffers, device);
    // Whatever the caller queued since the last call may be copying from that call's batch: what its memory waits for
    // before it is written again.
    const auto last = last_.lock();
    if (const py::object torch = last && last->pinned ? torch_on_cuda() : py::none(); !torch.is_none()) {
      const int index = torch.attr("cuda").attr("current_device")().cast<int>();
      if (!last->copied || last->copied->device() != index) last->copied = std::make_shared<CudaEvent>(index);
      last->copied->record(current_stream(Library::torch, index));
    }
    last_ = buffers;
    const std::shared_ptr<CudaEvent> copied = buffers->copied;
    py::gil_scoped_release unlocked;
    if (copied) copied->wait();
    replay->sample(buffers->batch, buffers->pointers.data(), nullptr);
  }

  py::list layout(int64_t batch) {
    check_batch(batch);
    py::list out;
    for (const ReplayOutput& o : replay_layout(alive()->config(), batch))
      out.append(py::make_tuple(o.name, py::tuple(py::cast(o.shape)), dtype_name(o.dtype)));
    return out;
  }

  void update_priorities(py::object indices_in, py::object td_in, py::object mask_in) {
    const auto replay = alive();
    const ReplayConfig& config = replay->config();
    CallStream stream(config.device);
    const Column indices(indices_in, "indices", DType::i64, {}, -1, config.device, stream);
    const int64_t batch = indices.count();
    const bool windows = config.shape.n_step > 0;
    const int64_t steps = windows ? 1 : config.shape.length - 1 - config.shape.burn_in;
    const std::vector<int64_t> shape(windows ? 0 : 1, steps);
    const Column td(td_in, "td", DType::f32, shape, batch, config.device, stream);
    std::optional<Column> mask;
    if (!mask_in.is_none()) mask.emplace(mask_in, "mask", DType::boolean, shape, batch, config.device, stream);
    indices.require_device(config.device, "indices");
    td.require_device(config.device, "td");
    if (mask) mask->require_device(config.device, "mask");
    CUstream_st* queue = stream.begin();
    py::gil_scoped_release unlocked;
    replay->update_priorities(batch, steps, indices.rows(), td.rows(), mask ? mask->rows() : ReplayColumn{}, queue);
    stream.end();
  }

  py::tuple save(const std::string& rows_path, const std::string& state_path, const std::vector<int64_t>& from) {
    const auto replay = alive();
    require(int64_t(from.size()) == replay->config().shape.streams, "from", "must name every stream");
    ReplaySaved saved;
    {
      py::gil_scoped_release unlocked;
      saved = replay->save(rows_path, state_path, from);
    }
    return py::make_tuple(saved.from, saved.to, saved.rows_bytes, saved.rows_crc, saved.state_bytes, saved.state_crc);
  }
  void load_rows(const std::string& path, std::vector<int64_t> from, std::vector<int64_t> to, int64_t bytes,
                 uint32_t crc) {
    const auto replay = alive();
    const size_t streams = size_t(replay->config().shape.streams);
    require(from.size() == streams && to.size() == streams, path.c_str(), "its manifest names other streams");
    ReplaySaved saved;
    saved.from = std::move(from), saved.to = std::move(to), saved.rows_bytes = bytes, saved.rows_crc = crc;
    py::gil_scoped_release unlocked;
    replay->load_rows(path, saved);
  }
  void load_state(const std::string& path, int64_t bytes, uint32_t crc) {
    const auto replay = alive();
    ReplaySaved saved;
    saved.state_bytes = bytes, saved.state_crc = crc;
    py::gil_scoped_release unlocked;
    replay->load_state(path, saved);
  }

  template <class Result>
  Result ask(Result (Replay::*what)()) {
    const auto replay = alive();
    py::gil_scoped_release unlocked;
    return (replay.get()->*what)();
  }
  int64_t bytes() { return alive()->bytes(); }
  int64_t capacity() { return alive()->config().shape.streams * alive()->config().shape.rows; }
  bool closed() const { return !replay_; }

 private:
  void sample_on_device(Replay& replay, ReplayBuffers& buffers, Device device) {
    CallStream call = buffers.stream ? *buffers.stream : CallStream(device);
    CUstream_st* queue = call.begin();
    if (buffers.order) buffers.order->begin(queue);
    {
      py::gil_scoped_release unlocked;
      replay.sample(buffers.batch, buffers.pointers.data(), queue);
      call.end();
    }
    if (buffers.order) buffers.order->end(queue);
  }

  std::shared_ptr<Replay> alive() const {
    if (!replay_) throw std::runtime_error("SequenceReplay: it has been closed");
    return replay_;
  }
  static void check_batch(int64_t batch) {
    require(batch >= 1 && batch <= (int64_t(1) << 24), "B", "must lie in 1..", int64_t(1) << 24, ", got ", batch);
  }
  static std::vector<ReplayOutput> checked_layout(const ReplayConfig& config, int64_t batch) {
    std::vector<ReplayOutput> layout = replay_layout(config, batch);
    double bytes = 0;
    for (const ReplayOutput& o : layout) {
      double own = double(item_size(o.dtype));
      for (int64_t d : o.shape) own *= double(d);
      bytes += own;
    }
    if (bytes > kMostBytes)
      throw MemoryShortage(
          text("B: ", batch, " items of this replay take ", gigabytes(bytes), ", more than any memory"));
    return layout;
  }
  [[noreturn]] static void refuse_unknown(const py::dict& rows, const ReplayConfig& config) {
    std::set<std::string> known{"reward", "terminated", "is_first", "is_last", "priority"};
    for (const ReplayField& f : config.fields) known.insert(f.name);
    std::string accepted;
    for (const std::string& name : known) accepted += (accepted.empty() ? "" : ", ") + name;
    for (const auto& entry : rows) {
      const auto name = py::str(entry.first).cast<std::string>();
      require(known.count(name), "rows", "'", name, "' is not a column of this replay, which has ", accepted);
    }
    throw std::invalid_argument("rows: must have names that are str");
  }

  std::shared_ptr<Replay> replay_;
  std::weak_ptr<ReplayBuffers> last_;  // of the last sample
};

}  // namespace
}  // namespace urlfast
URLFAST_MADE(urlfast::PyReplay)

namespace urlfast {

void bind_replay(py::module_& m) {
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const SystemError& error) {
      const py::object type = py::reinterpret_borrow<py::object>(PyExc_OSError);
      const py::object made = type(error.code, text(error.what(), ": ", std::strerror(error.code)), error.file);
      PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(made.ptr())), made.ptr());
    } catch (const MemoryShortage& error) {
      PyErr_SetString(PyExc_MemoryError, error.what());
    }
  });
  m.def(
      "crc32c",
      [](const py::bytes& data) {
        const std::string_view view = data;
        return crc32c(0, view.data(), int64_t(view.size()));
      },
      py::arg("data"), "CRC-32C of bytes, as saved replays use it.");
  py::class_<ReplayBuffers, std::shared_ptr<ReplayBuffers>>(m, "ReplayBuffers", "The arrays one batch is written to.")
      .def_readonly("batch", &ReplayBuffers::batch)
      .def_readonly("arrays", &ReplayBuffers::arrays);
  py::class_<PyReplay>(m, "SequenceReplay", "What urlfast.SequenceReplay stands on.")
      .def(py::init<int64_t, const std::vector<PyReplay::FieldTuple>&, int64_t, std::optional<int64_t>, int64_t,
                    int64_t, std::optional<int64_t>, std::optional<double>, std::optional<int64_t>, bool, double,
                    double, double, const std::string&, const std::string&, py::handle, uint64_t, int64_t>(),
           py::arg("capacity"), py::arg("fields"), py::kw_only(), py::arg("num_streams"), py::arg("sequence_length"),
           py::arg("stride"), py::arg("burn_in"), py::arg("n_step"), py::arg("gamma"), py::arg("frame_stack"),
           py::arg("cross_episodes"), py::arg("priority_exponent"), py::arg("importance_exponent"), py::arg("eta"),
           py::arg("storage"), py::arg("path"), py::arg("device"), py::arg("seed"), py::arg("expected_rows"))
      .def("close", &PyReplay::close)
      .def("add", &PyReplay::add, py::arg("rows"), py::arg("streams"))
      .def("empty", &PyReplay::empty, py::arg("batch"))
      .def("into", &PyReplay::into, py::arg("batch"), py::arg("arrays"))
      .def("sample", &PyReplay::sample, py::arg("buffers"))
      .def_static("stacks", &PyReplay::stacks, py::arg("frames"), py::arg("stack"))
      .def("layout", &PyReplay::layout, py::arg("batch"))
      .def("update_priorities", &PyReplay::update_priorities, py::arg("indices"), py::arg("td"), py::arg("mask"))
      .def("save", &PyReplay::save, py::arg("rows_path"), py::arg("state_path"), py::arg("begin"))
      .def("load_rows", &PyReplay::load_rows, py::arg("path"), py::arg("begin"), py::arg("end"), py::arg("size"),
           py::arg("crc"))
      .def("load_state", &PyReplay::load_state, py::arg("path"), py::arg("size"), py::arg("crc"))
      .def("size", [](PyReplay& r) { return r.ask(&Replay::size); })
      .def("sampleable", [](PyReplay& r) { return r.ask(&Replay::sampleable); })
      .def("stale_updates", [](PyReplay& r) { return r.ask(&Replay::stale_updates); })
      .def("totals", [](PyReplay& r) { return r.ask(&Replay::totals); })
      .def("bytes", &PyReplay::bytes)
      .def("capacity", &PyReplay::capacity)
      .def_property_readonly("closed", &PyReplay::closed);
}

}  // namespace urlfast
