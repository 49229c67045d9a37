#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <limits>
#include <mutex>

#include "common/check.hpp"
#include "common/cuda.hpp"
#include "replay/replay.hpp"
#include "replay/replay_files.hpp"
#include "replay/replay_kernels.cuh"
#include "replay/replay_storage.hpp"

namespace urlfast {
namespace {

constexpr int64_t kMaxSpare = 64;  // as on the CPU: slots decide the order of draws, and files name the ring's length
constexpr uint64_t kPhiloxStream = uint64_t('R') << 56;
constexpr int64_t kStagedRows = int64_t(4) << 20;    // bytes of rows that one launch takes from the host
constexpr int64_t kStagedInAll = int64_t(64) << 20;  // pinned, before an add waits for the device
constexpr int64_t kFileChunk = int64_t(4) << 20;
constexpr uint8_t kHasItem = 1, kChanged = 2;  // of a slot: its leaf is not 0; it stands in the list of changes

class DeviceMemory {
 public:
  DeviceMemory() = default;
  DeviceMemory(int device, int64_t bytes) : device_(device) {
    try {
      data_ = static_cast<char*>(cuda_allocate(device, bytes));
    } catch (const std::runtime_error& error) {
      throw MemoryShortage(error.what());
    }
  }
  DeviceMemory(DeviceMemory&& other) noexcept : device_(other.device_), data_(other.data_) { other.data_ = nullptr; }
  DeviceMemory& operator=(DeviceMemory&& other) noexcept {
    std::swap(device_, other.device_);
    std::swap(data_, other.data_);
    return *this;
  }
  ~DeviceMemory() { cuda_free(device_, data_); }
  char* data() const { return data_; }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  int device_ = 0;
  char* data_ = nullptr;
};

// Pinned memory that a launch reads, and when it has.
struct Staging {
  Staging(int device, int64_t size) : bytes(size), used(device), data(static_cast<char*>(cuda_allocate_host(size))) {}
  ~Staging() { cuda_free_host(data); }
  Staging(const Staging&) = delete;
  int64_t bytes;
  CudaEvent used;
  char* data;
};

struct Stream {
  Stream() { URLFAST_CUDA_CHECK(cudaStreamCreateWithFlags(&handle, cudaStreamNonBlocking)); }
  ~Stream() { cudaStreamDestroy(handle); }
  Stream(const Stream&) = delete;
  cudaStream_t handle;
};

// The widest access that all of these allow.
int width_of(int64_t bytes, const void* a, int64_t step = 0) {
  const uint64_t all = uint64_t(bytes) | reinterpret_cast<uintptr_t>(a) | uint64_t(step) | 16;
  return int(all & (~all + 1));
}

int64_t aligned(int64_t bytes) { return (bytes + 15) & ~int64_t(15); }

class ReplayCuda final : public Replay, private ReplayMemory {
 public:
  explicit ReplayCuda(ReplayConfig config)
      : config_(with_ring(std::move(config))),
        device_(config_.device.index),
        guard_(device_),
        slots_(config_.shape.streams * config_.shape.ring),
        tree_(slots_),
        last_(device_) {
    const ReplayShape& shape = config_.shape;
    for (const ReplayField& field : config_.fields) any_at_starts_ |= field.at_starts;
    start_capacity_ = std::min(slots_, slots_ / shape.stride + 1 + shape.streams);
    check_room();
    URLFAST_CUDA_CHECK(cudaDeviceGetAttribute(&processors_, cudaDevAttrMultiProcessorCount, device_));
    const bool prioritised = config_.priority_exponent > 0;
    for (const ReplayField& f : config_.fields)
      columns_.emplace_back(device_, (f.at_starts ? start_capacity_ : slots_) * f.row_bytes());
    auto zeroed = [&](int64_t bytes) {
      DeviceMemory memory(device_, bytes);
      URLFAST_CUDA_CHECK(cudaMemsetAsync(memory.data(), 0, size_t(bytes), io_.handle));
      return memory;
    };
    device_flags_ = zeroed(slots_);
    reward_ = zeroed(slots_ * 4);
    heads_ = zeroed(shape.streams * 8);
    nodes_ = zeroed(tree_.size() * 8);
    counters_ = zeroed(sizeof(DeviceCounters));
    if (prioritised) given_ = zeroed(slots_ * 4), claims_ = zeroed(slots_ * 4);
    if (any_at_starts_) device_entries_ = zeroed(slots_ * 4);
    tree_.nodes = nodes_.as<uint64_t>();
    set_counters(0, 1.0);

    flags_ = Pages(slots_);
    marks_ = Pages(slots_);
    if (any_at_starts_) {
      entry_of_slot_ = Pages(slots_ * 4);
      entries_.of_slot = reinterpret_cast<int32_t*>(entry_of_slot_.data());
    }
    index_ = std::make_unique<ReplayIndex>(shape, reinterpret_cast<uint8_t*>(flags_.data()));
    outputs_ = replay_layout(config_, 1).size();
    loaded_.from.assign(size_t(shape.streams), 0);
    loaded_.to.assign(size_t(shape.streams), 0);
    last_.record(io_.handle);
    guard_.release();
  }

  ~ReplayCuda() override {
    int previous = 0;
    if (cudaGetDevice(&previous) != cudaSuccess) return;
    cudaSetDevice(device_);
    cudaDeviceSynchronize();  // what was queued still uses this memory; an error has nobody left to hear it
    cudaSetDevice(previous);
  }

  const ReplayConfig& config() const override { return config_; }
  int64_t bytes() const override { return device_bytes(); }

  int64_t size() override {
    std::lock_guard<std::mutex> lock(mutex_);
    return held();
  }
  int64_t sampleable() override {
    std::lock_guard<std::mutex> lock(mutex_);
    return items_;
  }
  int64_t stale_updates() override {  // waits for the device
    std::lock_guard<std::mutex> lock(mutex_);
    Entry entry(*this);
    return int64_t(counters().stale);
  }
  std::pair<uint64_t, uint64_t> totals() override {  // waits for the device
    std::lock_guard<std::mutex> lock(mutex_);
    Entry entry(*this);
    std::vector<uint64_t> leaves(static_cast<size_t>(slots_));
    uint64_t total = 0, sum = 0;
    fetch(leaves.data(), tree_.nodes, slots_ * 8);
    fetch(&total, tree_.nodes + tree_.offset[tree_.levels - 1], 8);
    for (uint64_t leaf : leaves) sum += leaf;
    return {total, sum};
  }

  void add(const ReplayRows& rows, CUstream_st* stream) override {
    std::unique_lock<std::mutex> lock(mutex_);
    Entry entry(*this);
    check_replay_rows(*index_, rows, scratch_);
    refuse_capture(stream);
    while (saving_ && (would_overwrite(rows) || may_grow_starts(rows))) {
      idle_.wait(lock);
      check_replay_rows(*index_, rows, scratch_);  // another thread may have added
    }
    if (rows.count == 0) return;
    queue(stream, [&] {
      int64_t row_bytes = int64_t(sizeof(AppendedRow));
      each_column(rows, [&](const ReplayColumn& from, int64_t bytes, char*, bool) {
        if (!from.on_device) row_bytes += bytes;
      });
      const int64_t most = std::max<int64_t>(1, kStagedRows / row_bytes);
      begin_piece(0);
      for (int64_t i = 0; i < rows.count; ++i) {
        const int64_t s = rows.streams ? rows.streams[i] : i;
        if (i - piece_begin_ == most || index_->head(s) - piece_heads_[size_t(s)] == config_.shape.ring)
          append_piece(rows, i, stream);
        append_row(rows, i, s, stream);
      }
      append_piece(rows, rows.count, stream);
    });
  }

  void sample(int64_t batch, void* const* out, CUstream_st* stream) override {
    std::lock_guard<std::mutex> lock(mutex_);
    Entry entry(*this);
    if (items_ == 0)
      throw std::invalid_argument(text("sample: nothing to sample yet: ", held(), " rows held, and no complete ",
                                       config_.shape.n_step ? "transition" : "sequence", " among them"));
    refuse_capture(stream);
    if (batch > drawn_room_) {
      last_.wait();  // the smaller one may be in use
      drawn_room_ = 0;
      drawn_ = DeviceMemory(device_, batch * int64_t(sizeof(DrawnItem)));
      drawn_room_ = batch;
    }
    auto* indices = static_cast<int64_t*>(out[outputs_ - 3]);
    auto* probability = static_cast<float*>(out[outputs_ - 2]);
    auto* weight = static_cast<float*>(out[outputs_ - 1]);
    queue(stream, [&] {
      const Philox rng{config_.seed, kPhiloxStream | draws_};
      const int turn = int(draws_++ & 1);
      const DeviceReplay replay = on_device();
      auto* drawn = drawn_.as<DrawnItem>();
      draw_items<<<blocks(batch), kThreads, 0, stream>>>(
          replay, rng, batch, double(items_), config_.importance_exponent, turn, drawn, indices, probability, weight);
      URLFAST_CUDA_CHECK(cudaGetLastError());
      for (const GatherTable& table : gather_tables(out, weight, turn)) {
        gather_items<<<blocks(batch * table.units), kThreads, 0, stream>>>(replay, table, drawn, batch);
        URLFAST_CUDA_CHECK(cudaGetLastError());
      }
    });
  }

  void update_priorities(int64_t batch, int64_t steps, ReplayColumn indices, ReplayColumn td, ReplayColumn mask,
                         CUstream_st* stream) override {
    std::lock_guard<std::mutex> lock(mutex_);
    Entry entry(*this);
    require(batch <= int64_t(1) << 30, "indices", "must be at most 2^30, got ", batch);
    refuse_capture(stream);
    if (batch == 0) return;
    if (batch > priority_room_) {
      last_.wait();
      priority_room_ = 0;
      priority_ = DeviceMemory(device_, batch * 8);
      priority_room_ = batch;
    }
    queue(stream, [&] {
      const DeviceReplay replay = on_device();
      auto* priority = priority_.as<double>();
      const Rows<int64_t> index{indices.data, indices.step};
      const Rows<float> errors{td.data, td.step};
      const Rows<bool> where{mask.data, mask.step};
      claim_updates<<<blocks(batch), kThreads, 0, stream>>>(replay, batch, steps, index, errors, where, priority);
      URLFAST_CUDA_CHECK(cudaGetLastError());
      if (!replay.given) return;
      apply_updates<<<blocks((batch + 31) / 32), kThreads, 0, stream>>>(replay, batch, index, priority);
      URLFAST_CUDA_CHECK(cudaGetLastError());
    });
  }

  // Waits for the device. Rows go on being added meanwhile, unless they would overwrite what is being written.
  ReplaySaved save(const std::string& rows_path, const std::string& state_path,
                   const std::vector<int64_t>& from) override {
    const ReplayShape& shape = config_.shape;
    std::lock_guard<std::mutex> turn(turn_);
    ReplaySaved saved;
    std::vector<char> state;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      Entry entry(*this);
      for (int64_t s = 0; s < shape.streams; ++s) {
        const int64_t head = index_->head(s);
        saved.to.push_back(head);
        saved.from.push_back(std::clamp(from[size_t(s)], index_->tail(s), head));
      }
      std::vector<uint64_t> leaves(static_cast<size_t>(slots_));
      std::vector<float> given(static_cast<size_t>(given_.data() ? slots_ : 0));
      fetch(leaves.data(), tree_.nodes, slots_ * 8);
      if (given_.data()) fetch(given.data(), given_.data(), slots_ * 4);
      const DeviceCounters now = counters();
      ReplayCounters numbers;
      numbers.draws = draws_;
      numbers.stale = int64_t(now.stale);
      std::memcpy(&numbers.max_priority, &now.max_priority, 8);
      state = replay_state(config_, *index_, numbers, leaves.data(), given_.data() ? given.data() : nullptr);
      saving_ = true;
      saving_heads_.resize(size_t(shape.streams));
      for (int64_t s = 0; s < shape.streams; ++s) saving_heads_[size_t(s)] = index_->head(s);
    }
    struct Saving {
      ReplayCuda* replay;
      ~Saving() {
        {
          std::lock_guard<std::mutex> lock(replay->mutex_);
          replay->saving_ = false;
        }
        replay->idle_.notify_all();
      }
    } saving{this};
    const DeviceGuard guard(device_);
    write_replay(rows_path, state_path, config_, state, entries_.of_slot, *this, saved);
    return saved;
  }

  void load_rows(const std::string& path, const ReplaySaved& saved) override {
    std::lock_guard<std::mutex> turn(turn_);
    std::lock_guard<std::mutex> lock(mutex_);
    Entry entry(*this);
    last_.order(io_.handle);
    FileReader file(path, saved.rows_bytes, saved.rows_crc);
    read_replay_rows(file, config_, saved, entries_.of_slot, loaded_, *this);
    last_.record(io_.handle);
  }

  void load_state(const std::string& path, const ReplaySaved& saved) override {
    std::lock_guard<std::mutex> turn(turn_);
    std::lock_guard<std::mutex> lock(mutex_);
    Entry entry(*this);
    last_.order(io_.handle);
    FileReader file(path, saved.state_bytes, saved.state_crc);
    std::vector<uint64_t> nodes(static_cast<size_t>(tree_.size())), leaves(static_cast<size_t>(slots_));
    std::vector<float> given(static_cast<size_t>(given_.data() ? slots_ : 0));
    ReplayCounters numbers;
    read_replay_state(file, config_, loaded_, *index_, numbers, leaves.data(), given_.data() ? given.data() : nullptr);
    SumTree tree = tree_;
    tree.nodes = nodes.data();
    for (int64_t slot = 0; slot < slots_; ++slot) {
      if (leaves[size_t(slot)] == 0) continue;
      tree.set(slot, leaves[size_t(slot)]);
      marks_.data()[slot] = char(kHasItem);
      ++items_;
    }
    std::vector<int64_t> heads;
    for (const StreamState& stream : index_->streams()) heads.push_back(stream.head);
    store(nodes_.data(), nodes.data(), tree_.size() * 8);
    store(heads_.data(), heads.data(), int64_t(heads.size()) * 8);
    if (given_.data()) store(given_.data(), given.data(), slots_ * 4);
    if (any_at_starts_) store(device_entries_.data(), entries_.of_slot, slots_ * 4);
    draws_ = numbers.draws;
    set_counters(numbers.stale, numbers.max_priority);
    last_.record(io_.handle);
  }

 private:
  static ReplayConfig with_ring(ReplayConfig config) {
    config.shape.ring = config.shape.rows + std::min(kMaxSpare, config.shape.rows / 256 + 1);
    return config;
  }

  // Every call: this replay's device is the current one, and no error came before.
  struct Entry {
    explicit Entry(const ReplayCuda& replay) : guard(replay.device_) {
      if (!replay.broken_.empty())
        throw std::runtime_error("SequenceReplay: unusable since an earlier error: " + replay.broken_);
    }
    DeviceGuard guard;
  };
  // The same for the constructor's initialisers; released at its end or by its failure.
  struct Guard {
    explicit Guard(int device) : held(std::make_unique<DeviceGuard>(device)) {}
    void release() { held.reset(); }
    std::unique_ptr<DeviceGuard> held;
  };

  // Work of one call. Calls are ordered by one event, whatever streams they come on, so that none sees half of another.
  // When a launch fails, host and device no longer agree.
  template <class Body>
  void queue(CUstream_st* stream, Body&& body) {
    try {
      last_.order(stream);
      body();
      last_.record(stream);
    } catch (const std::exception& error) {
      broken_ = error.what();
      throw;
    }
  }

  void refuse_capture(CUstream_st* stream) const {
    if (cuda_capturing(device_, stream))
      throw std::runtime_error(
          "SequenceReplay: its calls cannot be captured in a CUDA graph (each one differs); sample "
          "first, and copy the batch to the graph's inputs");
  }

  int blocks(int64_t warps) const {  // enough to fill the device a few times; kernels walk over the rest
    return int(std::clamp<int64_t>((warps * 32 + kThreads - 1) / kThreads, 1, int64_t(processors_) * 32));
  }

  int64_t held() const {
    int64_t n = 0;
    for (const StreamState& s : index_->streams()) n += std::min(s.head, config_.shape.rows);
    return n;
  }

  int64_t device_bytes() const {
    int64_t per_row = 1 + 4 + (config_.priority_exponent > 0 ? 8 : 0) + (any_at_starts_ ? 4 : 0), at_start = 0;
    for (const ReplayField& f : config_.fields) (f.at_starts ? at_start : per_row) += f.row_bytes();
    return slots_ * per_row + start_capacity_ * at_start + tree_.size() * 8 + config_.shape.streams * 8 +
           int64_t(sizeof(DeviceCounters));
  }

  void check_room() const {
    size_t available = 0, all = 0;
    URLFAST_CUDA_CHECK(cudaMemGetInfo(&available, &all));
    const int64_t wanted = device_bytes();
    if (wanted <= int64_t(available)) return;
    char numbers[160];
    std::snprintf(numbers, sizeof numbers, "%.2f GB (%.0f bytes a row), but %.2f GB of %s are available",
                  double(wanted) * 1e-9, double(wanted) / double(slots_), double(available) * 1e-9,
                  config_.device.name().c_str());
    throw MemoryShortage(text("capacity: ", config_.shape.streams * config_.shape.rows, " rows take ", numbers,
                              "; use a smaller capacity, or device='cpu'"));
  }

  DeviceReplay on_device() const {
    DeviceReplay replay{};
    replay.shape = config_.shape;
    replay.tree = tree_;
    replay.slots = slots_;
    replay.flags = device_flags_.as<uint8_t>();
    replay.reward = reward_.as<float>();
    replay.heads = heads_.as<int64_t>();
    replay.given = given_.as<float>();
    replay.claims = claims_.as<uint32_t>();
    replay.entries = device_entries_.as<int32_t>();
    replay.counters = counters_.as<DeviceCounters>();
    replay.priority_exponent = config_.priority_exponent;
    replay.eta = config_.eta;
    replay.gamma = config_.gamma;
    return replay;
  }

  // Small transfers that wait. With mutex_ held.
  void fetch(void* to, const void* from, int64_t bytes) {
    last_.order(io_.handle);
    URLFAST_CUDA_CHECK(cudaMemcpyAsync(to, from, size_t(bytes), cudaMemcpyDeviceToHost, io_.handle));
    URLFAST_CUDA_CHECK(cudaStreamSynchronize(io_.handle));
  }
  void store(void* to, const void* from, int64_t bytes) {
    URLFAST_CUDA_CHECK(cudaMemcpyAsync(to, from, size_t(bytes), cudaMemcpyHostToDevice, io_.handle));
    URLFAST_CUDA_CHECK(cudaStreamSynchronize(io_.handle));
  }
  DeviceCounters counters() {
    DeviceCounters now;
    fetch(&now, counters_.data(), sizeof now);
    return now;
  }
  void set_counters(int64_t stale, double max_priority) {
    DeviceCounters now{};
    now.stale = static_cast<unsigned long long>(stale);
    std::memcpy(&now.max_priority, &max_priority, 8);
    store(counters_.data(), &now, sizeof now);
  }

  // Appending ---------------------------------------------------------------------------------------------------------

  // body(rows, bytes of one, the device's column, kept at starts) for every column that came.
  template <class Body>
  void each_column(const ReplayRows& rows, Body&& body) const {
    for (size_t c = 0; c < columns_.size(); ++c)
      body(rows.fields[c], config_.fields[c].row_bytes(), columns_[c].data(), config_.fields[c].at_starts);
    body(rows.reward, 4, reward_.data(), false);
    if (given_.data() && rows.priority.data) body(rows.priority, 4, given_.data(), false);
  }

  void begin_piece(int64_t first) {
    piece_begin_ = first;
    piece_heads_.resize(size_t(config_.shape.streams));
    for (int64_t s = 0; s < config_.shape.streams; ++s) piece_heads_[size_t(s)] = index_->head(s);
    appended_.clear();
    changes_.clear();
    starts_ = 0;
  }

  void append_row(const ReplayRows& rows, int64_t i, int64_t s, CUstream_st* stream) {
    const int64_t slot = index_->slot(s, index_->head(s));
    const uint8_t flags =
        uint8_t((*rows.terminated.row<uint8_t>(i) ? kTerminated : 0) | (*rows.is_first.row<uint8_t>(i) ? kFirst : 0) |
                (*rows.is_last.row<uint8_t>(i) ? kLast : 0));
    index_->append(s, flags, [&](int64_t t, bool ready) {
      char& mark = marks_.data()[index_->slot(s, t)];
      const bool has = mark & kHasItem;
      if (!ready && !has) return;
      if (mark & kChanged) {  // one change of a slot in a launch, where all run side by side
        append_piece(rows, i, stream);
        --piece_heads_[size_t(s)];  // this row is of the next piece
      }
      mark = char((ready ? kHasItem : 0) | kChanged);
      changes_.push_back(index_->slot(s, t) << 1 | int64_t(ready));
      items_ += int64_t(ready) - int64_t(has);
    });
    AppendedRow row{};
    row.slot = slot;
    row.stream = int32_t(s);
    row.head = index_->head(s);
    row.flags = uint8_t(flags_.data()[slot]);
    if (any_at_starts_) {
      entries_.place(slot, row.flags);
      row.entry = entries_.of_slot[slot];
      if (row.entry) row.start = int32_t(starts_++);
    }
    appended_.push_back(row);
  }

  // Queues the rows from piece_begin_ to `end` and the changes so far.
  void append_piece(const ReplayRows& rows, int64_t end, CUstream_st* stream) {
    const int64_t count = end - piece_begin_, changed = int64_t(changes_.size());
    counts_.assign(size_t(config_.shape.streams), 0);
    for (int64_t i = count - 1; i >= 0; --i)  // a stream's newest row alone sets its head: rows are copied in any order
      if (AppendedRow& row = appended_[size_t(i)]; counts_[size_t(row.stream)]++) row.stream = -1;
    if (entries_.last > start_capacity_) grow_starts(stream);

    int64_t bytes = aligned(count * int64_t(sizeof(AppendedRow))) + aligned(changed * 8);
    each_column(rows, [&](const ReplayColumn& from, int64_t row_bytes, char*, bool at_starts) {
      if (!from.on_device) bytes += aligned((at_starts ? starts_ : count) * row_bytes);
    });
    Staging& staging = staging_of(bytes);
    char* next = staging.data;
    auto take = [&](int64_t n) {
      char* at = next;
      next += aligned(n);
      return at;
    };
    auto* staged_rows = reinterpret_cast<AppendedRow*>(take(count * int64_t(sizeof(AppendedRow))));
    if (count) std::memcpy(staged_rows, appended_.data(), size_t(count) * sizeof(AppendedRow));
    auto* staged_changes = reinterpret_cast<int64_t*>(take(changed * 8));
    if (changed) std::memcpy(staged_changes, changes_.data(), size_t(changed) * 8);

    std::vector<AppendColumn>& columns = append_columns_;
    columns.clear();
    each_column(rows, [&](const ReplayColumn& from, int64_t row_bytes, char* to, bool at_starts) {
      AppendColumn column{};
      column.to = to;
      column.bytes = row_bytes;
      column.at_starts = at_starts;
      if (from.on_device) {
        column.from = from.row<char>(piece_begin_);
        column.step = from.step;
      } else {
        char* staged = take((at_starts ? starts_ : count) * row_bytes);
        column.from = staged;
        column.step = row_bytes;
        column.packed = at_starts;
        if (!at_starts && from.step == row_bytes) {
          if (count) std::memcpy(staged, from.row<char>(piece_begin_), size_t(count * row_bytes));
        } else {
          for (int64_t i = 0; i < count; ++i) {
            if (at_starts && appended_[size_t(i)].entry == 0) continue;
            std::memcpy(staged, from.row<char>(piece_begin_ + i), size_t(row_bytes));
            staged += row_bytes;
          }
        }
      }
      column.width = std::min(width_of(row_bytes, column.from, column.step), width_of(row_bytes, to));
      columns.push_back(column);
    });

    const DeviceReplay replay = on_device();
    for (size_t begin = 0; count && begin < columns.size(); begin += kMaxColumns) {
      AppendTable table{};
      table.columns = int(std::min<size_t>(columns.size() - begin, kMaxColumns));
      for (int c = 0; c < table.columns; ++c) {
        table.column[c] = columns[begin + size_t(c)];
        table.column[c].first = table.units;
        table.units += (table.column[c].bytes + kPiece - 1) / kPiece;
      }
      table.rows_too = begin + kMaxColumns >= columns.size();
      table.no_priority = !rows.priority.data;
      table.units += table.rows_too;
      append_rows<<<blocks(count * table.units), kThreads, 0, stream>>>(replay, table, staged_rows, count);
      URLFAST_CUDA_CHECK(cudaGetLastError());
    }
    if (changed && replay.given)
      change_leaves_by_priority<<<1, kChangeThreads, 0, stream>>>(replay, staged_changes, changed);
    else if (changed)
      change_leaves<<<blocks((changed + 31) / 32), kThreads, 0, stream>>>(replay, staged_changes, changed);
    URLFAST_CUDA_CHECK(cudaGetLastError());
    staging.used.record(stream);
    for (int64_t change : changes_) marks_.data()[change >> 1] &= char(~kChanged);
    begin_piece(end);
  }

  Staging& staging_of(int64_t bytes) {
    int64_t in_all = 0;
    Staging* oldest = nullptr;
    for (size_t i = 0; i < staging_.size(); ++i) {
      Staging& staging = *staging_[i];
      in_all += staging.bytes;
      if (staging.bytes < bytes) continue;
      if (staging.used.passed()) {
        std::rotate(staging_.begin() + long(i), staging_.begin() + long(i) + 1, staging_.end());  // newest at the end
        return *staging_.back();
      }
      if (!oldest) oldest = &staging;
    }
    if (!oldest || in_all < kStagedInAll) {
      int64_t size = int64_t(1) << 18;
      while (size < bytes) size *= 2;
      auto made = std::make_unique<Staging>(device_, size);
      if (made->data) {
        staging_.push_back(std::move(made));
        return *staging_.back();
      }
      if (!oldest) throw MemoryShortage(text("SequenceReplay: could not pin ", size, " bytes of host memory"));
    }
    oldest->used.wait();
    return *oldest;
  }

  bool may_grow_starts(const ReplayRows& rows) const {
    return any_at_starts_ && entries_.last + rows.count - int64_t(entries_.free.size()) > start_capacity_;
  }
  // More episodes are shorter than the stride than there was room for.
  void grow_starts(CUstream_st* stream) {
    const int64_t wanted = std::min(slots_, std::max<int64_t>(2 * start_capacity_, entries_.last));
    for (size_t c = 0; c < columns_.size(); ++c) {
      const int64_t row_bytes = config_.fields[c].row_bytes();
      if (!config_.fields[c].at_starts) continue;
      DeviceMemory larger(device_, wanted * row_bytes);
      URLFAST_CUDA_CHECK(cudaMemcpyAsync(larger.data(), columns_[c].data(), size_t(start_capacity_ * row_bytes),
                                         cudaMemcpyDeviceToDevice, stream));
      URLFAST_CUDA_CHECK(cudaStreamSynchronize(stream));
      columns_[c] = std::move(larger);
    }
    start_capacity_ = wanted;
  }

  bool would_overwrite(const ReplayRows& rows) {
    const ReplayShape& shape = config_.shape;
    counts_.assign(size_t(shape.streams), 0);
    for (int64_t i = 0; i < rows.count; ++i) {
      const int64_t s = rows.streams ? rows.streams[i] : i;
      if (index_->head(s) + ++counts_[size_t(s)] - shape.ring > saving_heads_[size_t(s)] - shape.rows) return true;
    }
    return false;
  }

  // Sampling ----------------------------------------------------------------------------------------------------------

  const std::vector<GatherTable>& gather_tables(void* const* out, float* weight, int turn) {
    const ReplayShape& shape = config_.shape;
    std::vector<GatherColumn>& columns = gather_columns_;
    columns.clear();
    for (size_t c = 0; c < columns_.size(); ++c) {
      const ReplayField& field = config_.fields[c];
      GatherColumn column{};
      column.from = columns_[c].data();
      column.to = static_cast<char*>(*out++);
      column.bytes = field.row_bytes();
      column.width = std::min(width_of(column.bytes, column.from), width_of(column.bytes, column.to));
      if (shape.n_step && int(c) == config_.observation) {
        column.next = static_cast<char*>(*out++);
        column.width = std::min(column.width, width_of(column.bytes, column.next));
      }
      column.pieces = (column.bytes + kPiece - 1) / kPiece;
      column.stacked = config_.stacked(c);
      column.at_starts = field.at_starts;
      column.frames = int32_t(shape.n_step      ? (column.stacked ? shape.stack : 1)
                              : field.at_starts ? 1
                                                : shape.length + (column.stacked ? shape.stack - 1 : 0));
      columns.push_back(column);
    }
    std::vector<GatherTable>& tables = gather_tables_;
    tables.clear();
    for (size_t begin = 0; begin == 0 || begin < columns.size(); begin += kMaxColumns) {
      GatherTable table{};
      table.turn = turn;
      table.columns = int(std::min<size_t>(columns.size() - begin, kMaxColumns));
      for (int c = 0; c < table.columns; ++c) {
        GatherColumn& column = table.column[c] = columns[begin + size_t(c)];
        column.first = table.units;
        table.units += column.pieces * column.frames * (column.next ? 2 : 1);
      }
      tables.push_back(table);
    }
    GatherTable& table = tables.back();
    table.scalars_too = true;
    table.units += 1;
    table.weight = weight;
    table.reward = static_cast<float*>(out[0]);
    if (shape.n_step) {
      table.discount = static_cast<float*>(out[1]);
      table.steps = static_cast<int64_t*>(out[2]);
    } else {
      table.terminated = static_cast<bool*>(out[1]);
      table.is_first = static_cast<bool*>(out[2]);
      table.is_last = static_cast<bool*>(out[3]);
      table.mask = static_cast<bool*>(out[4]);
    }
    return tables;
  }

  // Files. With turn_ held ------------------------------------------------------------------------------------------

  std::pair<char*, int64_t> memory(int column, int64_t from, int64_t rows) const {
    if (column == kRewardColumn) return {reward_.data() + from * 4, rows * 4};
    const int64_t bytes = config_.fields[size_t(column)].row_bytes();
    return {columns_[size_t(column)].data() + from * bytes, rows * bytes};
  }
  char* file_chunk() {
    if (!file_chunk_) file_chunk_ = std::make_unique<Staging>(device_, kFileChunk);
    if (!file_chunk_->data)
      throw MemoryShortage(text("SequenceReplay: could not pin ", kFileChunk, " bytes of host memory"));
    return file_chunk_->data;
  }
  void write_to(FileWriter& file, int column, int64_t from, int64_t rows) override {
    if (column == kFlagsColumn) return file.write(flags_.data() + from, rows);
    auto [data, bytes] = memory(column, from, rows);
    for (int64_t n; bytes > 0; data += n, bytes -= n) {
      n = std::min(bytes, kFileChunk);
      URLFAST_CUDA_CHECK(cudaMemcpyAsync(file_chunk(), data, size_t(n), cudaMemcpyDeviceToHost, io_.handle));
      URLFAST_CUDA_CHECK(cudaStreamSynchronize(io_.handle));
      file.write(file_chunk(), n);
    }
  }
  void read_from(FileReader& file, int column, int64_t from, int64_t rows) override {
    if (column == kFlagsColumn) {
      file.read(flags_.data() + from, rows);
      return store(device_flags_.data() + from, flags_.data() + from, rows);
    }
    auto [data, bytes] = memory(column, from, rows);
    for (int64_t n; bytes > 0; data += n, bytes -= n) {
      n = std::min(bytes, kFileChunk);
      file.read(file_chunk(), n);
      store(data, file_chunk(), n);
    }
  }
  void loading(int64_t slot) override {
    entries_.place(slot, uint8_t(flags_.data()[slot]));
    if (entries_.last > start_capacity_) grow_starts(io_.handle);
  }

  ReplayConfig config_;
  int device_;
  Guard guard_;  // while constructing
  int64_t slots_ = 0;
  int processors_ = 1;
  bool any_at_starts_ = false;
  int64_t start_capacity_ = 0;  // rows of a column kept at starts
  SumTree tree_;                // its nodes on the device
  Stream io_;                   // files and counters
  CudaEvent last_;              // when all that was queued is done
  std::string broken_;

  std::vector<DeviceMemory> columns_;
  DeviceMemory device_flags_, reward_, heads_, nodes_, counters_, given_, claims_, device_entries_, drawn_, priority_;
  int64_t drawn_room_ = 0, priority_room_ = 0;

  // The host knows every flag, so it knows which items there are without asking the device.
  Pages flags_, marks_, entry_of_slot_;
  std::unique_ptr<ReplayIndex> index_;
  ReplayEntries entries_;
  int64_t items_ = 0;
  uint64_t draws_ = 0;
  size_t outputs_ = 0;
  std::vector<int8_t> scratch_;
  std::vector<AppendColumn> append_columns_;
  std::vector<GatherColumn> gather_columns_;
  std::vector<GatherTable> gather_tables_;
  std::vector<int64_t> counts_;
  ReplayLoaded loaded_;

  int64_t piece_begin_ = 0, starts_ = 0;  // rows that travel by one launch
  std::vector<int64_t> piece_heads_, changes_;
  std::vector<AppendedRow> appended_;
  std::vector<std::unique_ptr<Staging>> staging_;
  std::unique_ptr<Staging> file_chunk_;

  std::mutex turn_;   // one save or load at a time
  std::mutex mutex_;  // everything but what a save writes; taken after turn_
  std::condition_variable idle_;
  bool saving_ = false;
  std::vector<int64_t> saving_heads_;
};

}  // namespace

std::unique_ptr<Replay> make_replay_cuda(ReplayConfig config) {
  return std::make_unique<ReplayCuda>(std::move(config));
}

}  // namespace urlfast
