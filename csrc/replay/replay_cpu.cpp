#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstring>
#include <limits>
#include <mutex>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "common/check.hpp"
#include "common/parallel.hpp"
#include "replay/replay.hpp"
#include "replay/replay_storage.hpp"
#include "replay/sum_tree.hpp"

namespace urlfast {
namespace {

constexpr int64_t kMaxSpare = 64;  // rows a stream may grow by while a batch is being read
// Non-temporal stores: rows below 1 kB lose by them, and a batch that the caches hold is read from there (2 MB of
// frames copied and then read once: 150 us without, 200 with; 29 MB: 4200 and 3500).
constexpr int64_t kStreamRow = 1 << 10;
constexpr int64_t kStreamBatch = 4 << 20;
constexpr int64_t kGrain = 1 << 17;  // bytes of a batch worth a thread
constexpr uint64_t kPhiloxStream = uint64_t('R') << 56;
constexpr char kRowsMagic[9] = "URLFRPR1", kStateMagic[9] = "URLFRPS1";

// Past the caches: a batch larger than they are is not read before the next thing evicts it, and a store that bypasses
// them saves reading the line it overwrites.
void copy_past_caches(char* to, const char* from, size_t bytes) {
#if defined(__SSE2__)
  const size_t head = std::min(bytes, size_t(-reinterpret_cast<uintptr_t>(to) & 15));
  std::memcpy(to, from, head);
  to += head, from += head, bytes -= head;
  for (; bytes >= 64; bytes -= 64, to += 64, from += 64) {
    _mm_prefetch(from + 1024, _MM_HINT_NTA);
    const auto* f = reinterpret_cast<const __m128i*>(from);
    auto* t = reinterpret_cast<__m128i*>(to);
    const __m128i a = _mm_loadu_si128(f), b = _mm_loadu_si128(f + 1), c = _mm_loadu_si128(f + 2),
                  d = _mm_loadu_si128(f + 3);
    _mm_stream_si128(t, a), _mm_stream_si128(t + 1, b), _mm_stream_si128(t + 2, c), _mm_stream_si128(t + 3, d);
  }
#endif
  std::memcpy(to, from, bytes);
}

void prefetch(const char* address) {  // any address: it never faults
#if defined(__GNUC__)
  __builtin_prefetch(address);
#endif
}

void fence() {
#if defined(__SSE2__)
  _mm_sfence();  // non-temporal stores become visible before the batch is handed over
#endif
}

void copy_small(char* to, const char* from, size_t bytes) {
  if (bytes == 8)
    std::memcpy(to, from, 8);
  else if (bytes == 4)
    std::memcpy(to, from, 4);
  else
    std::memcpy(to, from, bytes);
}

struct Errors {
  double sum = 0;  // not finite when one of them is not
  float most = 0;
  int64_t count = 0;
};

// Eight lanes, so that the compiler need not reorder sums to use its vectors; the order is the same on every machine.
Errors errors_in(const float* td, int64_t n) {
  constexpr int kLanes = 8;
  double sum[kLanes] = {};
  float most[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes)
    for (int l = 0; l < kLanes; ++l) {
      const float d = std::fabs(td[j + l]);
      sum[l] += double(d);
      most[l] = most[l] > d ? most[l] : d;
    }
  for (; j < n; ++j) {
    const float d = std::fabs(td[j]);
    sum[j % kLanes] += double(d);
    most[j % kLanes] = most[j % kLanes] > d ? most[j % kLanes] : d;
  }
  Errors e{0, 0, n};
  for (int l = 0; l < kLanes; ++l) e.sum += sum[l], e.most = e.most > most[l] ? e.most : most[l];
  return e;
}

Errors errors_where(const float* td, const bool* mask, int64_t n) {
  Errors e;
  for (int64_t j = 0; j < n; ++j) {
    if (!mask[j]) continue;
    const float d = std::fabs(td[j]);
    e.sum += double(d), e.most = e.most > d ? e.most : d, ++e.count;
  }
  return e;
}

struct Item {
  int64_t stream, t;
  int64_t place;       // t % ring
  int64_t rows;        // of the sequence; steps of the n-step window
  int64_t before;      // frames of the stack before t that its episode has
  int64_t before_end;  // the same for the row `rows` steps later (n-step)
  int64_t entry;       // where the columns kept at starts have it
  bool terminated;
};

class ReplayCpu final : public Replay {
 public:
  explicit ReplayCpu(ReplayConfig config) : config_(std::move(config)) {
    ReplayShape& shape = config_.shape;
    shape.ring = shape.rows + std::min(kMaxSpare, shape.rows / 256 + 1);
    slots_ = shape.streams * shape.ring;
    tree_ = SumTree(slots_);
    for (const ReplayField& field : config_.fields) any_at_starts_ |= field.at_starts;
    check_room();
    const bool prioritised = config_.priority_exponent > 0;
    int file = -1;
    int64_t file_bytes = 0;
    constexpr int64_t kAlign = 1 << 16;
    if (config_.file) {
      for (const ReplayField& f : config_.fields)
        if (!f.at_starts) file_bytes += (slots_ * f.row_bytes() + kAlign - 1) / kAlign * kAlign;
      file = scratch_file(config_.path, std::max(file_bytes, kAlign));
    }
    struct Closer {
      int file;
      ~Closer() {
        if (file >= 0) ::close(file);  // the mappings keep it
      }
    } closer{file};
    int64_t offset = 0;
    for (const ReplayField& f : config_.fields) {
      const int64_t column = slots_ * f.row_bytes();
      if (config_.file && !f.at_starts) {
        columns_.emplace_back(file, offset, column);
        offset += (column + kAlign - 1) / kAlign * kAlign;
      } else {
        columns_.emplace_back(column);
      }
    }
    flags_ = Pages(slots_);
    reward_ = Pages(slots_ * 4);
    nodes_ = Pages(tree_.size() * 8);
    if (prioritised) given_ = Pages(slots_ * 4);
    if (any_at_starts_) entries_ = Pages(slots_ * 4);
    tree_.nodes = reinterpret_cast<uint64_t*>(nodes_.data());
    index_ = std::make_unique<ReplayIndex>(shape, reinterpret_cast<uint8_t*>(flags_.data()));
    outputs_ = replay_layout(config_, 1).size();
    loaded_from_.assign(size_t(shape.streams), 0);
    loaded_to_.assign(size_t(shape.streams), 0);
  }

  const ReplayConfig& config() const override { return config_; }

  int64_t bytes() const override { return memory_bytes(slots_) + (config_.file ? file_bytes(slots_) : 0); }

  int64_t size() override {
    std::lock_guard<std::mutex> lock(mutex_);
    int64_t n = 0;
    for (const StreamState& s : index_->streams()) n += std::min(s.head, config_.shape.rows);
    return n;
  }
  int64_t sampleable() override {
    std::lock_guard<std::mutex> lock(mutex_);
    return items_;
  }
  int64_t stale_updates() override {
    std::lock_guard<std::mutex> lock(mutex_);
    return stale_;
  }

  std::pair<uint64_t, uint64_t> totals() override {
    std::lock_guard<std::mutex> lock(mutex_);
    uint64_t sum = 0;
    for (int64_t i = 0; i < slots_; ++i) sum += tree_.leaf(i);
    return {tree_.total(), sum};
  }

  void add(const ReplayRows& rows) override {
    std::unique_lock<std::mutex> lock(mutex_);
    check_replay_rows(*index_, rows, scratch_);
    if (reading_ && would_overwrite(rows)) {
      idle_.wait(lock, [&] { return !reading_ || !would_overwrite(rows); });
      check_replay_rows(*index_, rows, scratch_);  // another adder may have come first
    }
    for (int64_t i = 0; i < rows.count; ++i) {
      const int64_t s = rows.streams ? rows.streams[i] : i;
      const int64_t slot = index_->slot(s, index_->head(s));
      for (size_t c = 0; c < columns_.size(); ++c) {
        if (config_.fields[c].at_starts) continue;
        const int64_t n = config_.fields[c].row_bytes();
        copy_small(columns_[c].data() + slot * n, rows.fields[c].row<char>(i), size_t(n));
      }
      reward()[slot] = *rows.reward.row<float>(i);
      if (given()) given()[slot] = rows.priority.data ? *rows.priority.row<float>(i) : std::nanf("");
      const uint8_t flags =
          uint8_t((*rows.terminated.row<bool>(i) ? kTerminated : 0) | (*rows.is_first.row<bool>(i) ? kFirst : 0) |
                  (*rows.is_last.row<bool>(i) ? kLast : 0));
      index_->append(s, flags, [&](int64_t t, bool ready) { change(s, t, ready); });
      if (!any_at_starts_) continue;
      place_entry(slot);
      if (entries()[slot] == 0) continue;
      for (size_t c = 0; c < columns_.size(); ++c)
        if (config_.fields[c].at_starts)
          std::memcpy(start_row(c, slot), rows.fields[c].row<char>(i), size_t(config_.fields[c].row_bytes()));
    }
  }

  void sample(int64_t batch, void* const* out) override {
    std::lock_guard<std::mutex> turn(turn_);
    std::vector<Item>& items = drawn_;
    items.resize(static_cast<size_t>(batch));
    auto* indices = static_cast<int64_t*>(out[outputs_ - 3]);
    auto* probability = static_cast<float*>(out[outputs_ - 2]);
    auto* weight = static_cast<float*>(out[outputs_ - 1]);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      const uint64_t total = tree_.total();
      if (total == 0) {
        int64_t held = 0;
        for (const StreamState& s : index_->streams()) held += std::min(s.head, config_.shape.rows);
        throw std::invalid_argument(text("sample: nothing to sample yet: ", held, " rows held, and no complete ",
                                         config_.shape.n_step ? "transition" : "sequence", " among them"));
      }
      const Philox rng{config_.seed, kPhiloxStream | draws_++};
      float most = 0;
      for (int64_t i = 0; i < batch; ++i) {
        const int64_t slot = tree_.find(tree_draw(rng, uint64_t(i), total));
        items[size_t(i)] = describe(slot);
        const double p = double(tree_.leaf(slot)) / double(total);
        indices[i] = items[size_t(i)].t * config_.shape.streams + items[size_t(i)].stream;
        probability[i] = float(p);
        const double w =
            config_.importance_exponent == 0 ? 1.0 : std::pow(double(items_) * p, -config_.importance_exponent);
        weight[i] = float(w);
        most = std::max(most, weight[i]);
      }
      for (int64_t i = 0; i < batch; ++i) weight[i] /= most;
      begin_reading();
    }
    gather(items, out);
    end_reading();
  }

  void update_priorities(int64_t batch, int64_t steps, ReplayColumn indices, ReplayColumn td,
                         ReplayColumn mask) override {
    const ReplayShape& shape = config_.shape;
    std::lock_guard<std::mutex> lock(mutex_);
    update_.resize(static_cast<size_t>(batch));
    for (int64_t i = 0; i < batch; ++i) {
      const int64_t index = *indices.row<int64_t>(i), s = index % shape.streams, t = index / shape.streams;
      require(index >= 0 && t < index_->head(s), "indices", "must be those of a sampled batch, got ", index);
      Update& update = update_[size_t(i)];
      update.priority = -1;
      update.slot = -1;
      if (t < index_->tail(s) || tree_.leaf(index_->slot(s, t)) == 0) continue;
      update.slot = index_->slot(s, t);
      const Errors e = mask.data ? errors_where(td.row<float>(i), mask.row<bool>(i), steps)
                                 : errors_of(td.row<float>(i), steps, index_->flags(s), t);
      require(std::isfinite(e.sum), "td", "must be finite where it counts, got NaN or infinity in row ", i);
      if (e.count)
        update.priority =
            shape.n_step ? double(e.most) : config_.eta * double(e.most) + (1 - config_.eta) * e.sum / double(e.count);
    }
    for (const Update& update : update_) {
      if (update.slot < 0)
        ++stale_;
      else if (update.priority >= 0 && given())
        tree_.set(update.slot, leaf_of(update.priority));
    }
  }

  ReplaySaved save(const std::string& rows_path, const std::string& state_path,
                   const std::vector<int64_t>& from) override {
    const ReplayShape& shape = config_.shape;
    std::lock_guard<std::mutex> turn(turn_);
    ReplaySaved saved;
    std::vector<char> state;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (int64_t s = 0; s < shape.streams; ++s) {
        const int64_t head = index_->head(s);
        saved.to.push_back(head);
        saved.from.push_back(std::clamp(from[size_t(s)], index_->tail(s), head));
      }
      state = state_bytes();
      begin_reading();
    }
    struct Reading {
      ReplayCpu* replay;
      ~Reading() { replay->end_reading(); }
    } reading{this};
    FileWriter state_file(state_path);
    state_file.write(state.data(), int64_t(state.size()));
    if (!rows_path.empty()) {
      FileWriter rows_file(rows_path);
      write_rows(rows_file, saved);
      rows_file.finish();
      saved.rows_bytes = rows_file.bytes(), saved.rows_crc = rows_file.crc();
    }
    try {
      state_file.finish();
    } catch (...) {
      if (!rows_path.empty()) unlink(rows_path.c_str());
      throw;
    }
    saved.state_bytes = state_file.bytes(), saved.state_crc = state_file.crc();
    return saved;
  }

  void load_rows(const std::string& path, const ReplaySaved& saved) override {
    const ReplayShape& shape = config_.shape;
    std::lock_guard<std::mutex> lock(mutex_);
    FileReader file(path, saved.rows_bytes, saved.rows_crc);
    check_header(file, kRowsMagic);
    for (int64_t s = 0; s < shape.streams; ++s) {
      int64_t range[2];
      file.read(range, sizeof range);
      if (range[0] != saved.from[size_t(s)] || range[1] != saved.to[size_t(s)] || range[0] < 0 || range[0] > range[1] ||
          range[1] > (int64_t(1) << 40))
        file.refuse("is damaged: it holds other rows than the manifest says");
    }
    for (int64_t s = 0; s < shape.streams; ++s) {
      const int64_t begin = saved.from[size_t(s)], end = saved.to[size_t(s)];
      if (begin < loaded_to_[size_t(s)]) file.refuse("is damaged: its rows are not newer than those before it");
      if (begin > loaded_to_[size_t(s)]) loaded_from_[size_t(s)] = begin;
      loaded_to_[size_t(s)] = end;
      runs(s, begin, end, [&](int64_t slot, int64_t n) { file.read(flags_.data() + slot, n); });
      runs(s, begin, end, [&](int64_t slot, int64_t n) { file.read(reward() + slot, n * 4); });
      for (size_t c = 0; c < columns_.size(); ++c) {
        const int64_t bytes = config_.fields[c].row_bytes();
        if (!config_.fields[c].at_starts)
          runs(s, begin, end,
               [&](int64_t slot, int64_t n) { file.read(columns_[c].data() + slot * bytes, n * bytes); });
      }
      if (!any_at_starts_) continue;
      for (int64_t t = begin; t < end; ++t) place_entry(index_->slot(s, t));
      for (size_t c = 0; c < columns_.size(); ++c)
        for (int64_t t = begin; config_.fields[c].at_starts && t < end; ++t)
          if (entries()[index_->slot(s, t)]) file.read(start_row(c, index_->slot(s, t)), config_.fields[c].row_bytes());
    }
    file.finish();
  }

  void load_state(const std::string& path, const ReplaySaved& saved) override {
    const ReplayShape& shape = config_.shape;
    std::lock_guard<std::mutex> lock(mutex_);
    FileReader file(path, saved.state_bytes, saved.state_crc);
    check_header(file, kStateMagic);
    file.read(&draws_, 8);
    file.read(&stale_, 8);
    file.read(&max_priority_, 8);
    if (!(max_priority_ > 0) || !std::isfinite(max_priority_))
      file.refuse("is damaged: its highest priority is not one");
    for (int64_t s = 0; s < shape.streams; ++s) {
      StreamState& stream = index_->streams()[size_t(s)];
      file.read(&stream, sizeof stream);
      const int64_t tail = index_->tail(s);
      if (stream.head < 0 || stream.head != loaded_to_[size_t(s)] ||
          (stream.head > 0 && loaded_from_[size_t(s)] > tail) || stream.episode < 0 || stream.episode > stream.head ||
          stream.pending < tail || stream.pending > stream.head + shape.stride)
        file.refuse("is damaged: it does not fit the rows that were loaded");
      std::vector<uint8_t> ready(size_t(stream.head - tail + 7) / 8);
      file.read(ready.data(), int64_t(ready.size()));
      for (int64_t t = tail; t < stream.head; ++t) {
        if (!(ready[size_t(t - tail) / 8] >> ((t - tail) & 7) & 1)) continue;
        uint64_t leaf = 1;
        if (given()) file.read(&leaf, 8);
        if (leaf == 0 || leaf > (uint64_t(1) << 63) / uint64_t(slots_))
          file.refuse("is damaged: a priority is out of range");
        tree_.set(index_->slot(s, t), leaf);
        ++items_;
      }
      if (given())
        runs(s, std::min(stream.pending, stream.head), stream.head,
             [&](int64_t slot, int64_t n) { file.read(given() + slot, n * 4); });
    }
    file.finish();
  }

 private:
  float* reward() const { return reinterpret_cast<float*>(reward_.data()); }
  float* given() const { return reinterpret_cast<float*>(given_.data()); }
  int32_t* entries() const { return reinterpret_cast<int32_t*>(entries_.data()); }  // 1 + the entry; 0: none
  char* start_row(size_t c, int64_t slot) const {
    return columns_[c].data() + int64_t(entries()[slot] - 1) * config_.fields[c].row_bytes();
  }
  int64_t memory_bytes(int64_t slots) const {
    const ReplayShape& shape = config_.shape;
    int64_t per_row = 1 + 4 + (config_.priority_exponent > 0 ? 4 : 0) + (any_at_starts_ ? 4 : 0);
    int64_t at_start = 0;
    for (const ReplayField& f : config_.fields) {
      if (f.at_starts)
        at_start += f.row_bytes();
      else if (!config_.file)
        per_row += f.row_bytes();
    }
    const int64_t starts = slots / shape.stride + (slots % shape.stride ? 1 : 0);
    return slots * per_row + starts * at_start + SumTree(std::max<int64_t>(slots, 1)).size() * 8;
  }
  int64_t file_bytes(int64_t slots) const {
    int64_t n = 0;
    for (const ReplayField& f : config_.fields)
      if (!f.at_starts) n += slots * f.row_bytes();
    return n;
  }

  void check_room() const {
    const int64_t rows = config_.expected_rows >= 0 ? std::min(config_.expected_rows, slots_) : slots_;
    const int64_t wanted = memory_bytes(rows), available = available_memory();
    if (available < 0 || wanted <= available) return;
    char numbers[160];
    std::snprintf(numbers, sizeof numbers, "%.2f GB (%.0f bytes a row), but %.2f GB of memory are available",
                  double(wanted) * 1e-9, double(wanted) / double(std::max<int64_t>(rows, 1)), double(available) * 1e-9);
    throw MemoryShortage(text("capacity: ", config_.shape.streams * config_.shape.rows, " rows take ", numbers,
                              "; use a smaller capacity", config_.file ? "" : ", or storage='file'"));
  }

  bool would_overwrite(const ReplayRows& rows) {
    const ReplayShape& shape = config_.shape;
    counts_.assign(size_t(shape.streams), 0);
    for (int64_t i = 0; i < rows.count; ++i) {
      const int64_t s = rows.streams ? rows.streams[i] : i;
      if (index_->head(s) + ++counts_[size_t(s)] - shape.ring > reading_heads_[size_t(s)] - shape.rows) return true;
    }
    return false;
  }

  void begin_reading() {  // with mutex_ held
    reading_ = true;
    reading_heads_.resize(size_t(config_.shape.streams));
    for (int64_t s = 0; s < config_.shape.streams; ++s) reading_heads_[size_t(s)] = index_->head(s);
  }
  void end_reading() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      reading_ = false;
    }
    idle_.notify_all();
  }

  struct Update {
    int64_t slot;     // -1: the item is gone
    double priority;  // -1: as it is
  };

  // The errors of the transitions that exist after the burn-in of the item at t.
  Errors errors_of(const float* td, int64_t steps, FlagRing flags, int64_t t) const {
    const ReplayShape& shape = config_.shape;
    if (shape.n_step) return errors_in(td, 1);
    if (!shape.cross_episodes) {
      const int64_t rows = sequence_rows(flags, t, shape.length, false);
      return errors_in(td, std::min(steps, rows - 1 - shape.burn_in));
    }
    Errors e;
    for (int64_t j = 0; j < steps; ++j)
      if (transition_exists(flags, t + shape.burn_in + j)) {
        const float d = std::fabs(td[j]);
        e.sum += double(d), e.most = e.most > d ? e.most : d, ++e.count;
      }
    return e;
  }

  uint64_t leaf_of(double priority) {
    max_priority_ = std::max(max_priority_, priority);
    return tree_weight(std::pow(priority, config_.priority_exponent), slots_);
  }

  void change(int64_t s, int64_t t, bool ready) {
    const int64_t slot = index_->slot(s, t);
    const bool was = tree_.leaf(slot) != 0;
    uint64_t leaf = ready ? 1 : 0;
    if (ready && given()) leaf = leaf_of(std::isnan(given()[slot]) ? max_priority_ : double(given()[slot]));
    tree_.set(slot, leaf);
    items_ += int64_t(leaf != 0) - int64_t(was);
  }

  // Gives the slot an entry in the columns kept at starts if its row is one, and takes back the one its last row had.
  // Freed entries are used first, so that only as many pages are touched as there ever were starts at one time.
  void place_entry(int64_t slot) {
    if (int32_t& entry = entries()[slot]) {
      free_entries_.push_back(entry);
      entry = 0;
    }
    if (!(uint8_t(flags_.data()[slot]) & kStart)) return;
    if (free_entries_.empty()) {
      entries()[slot] = ++last_entry_;
    } else {
      entries()[slot] = free_entries_.back();
      free_entries_.pop_back();
    }
  }

  Item describe(int64_t slot) const {
    const ReplayShape& shape = config_.shape;
    Item item{};
    item.stream = slot / shape.ring;
    item.t = index_->row_of_slot(slot);
    item.place = slot % shape.ring;
    const FlagRing flags = index_->flags(item.stream);
    item.before = frames_before(flags, item.t, shape.stack);
    if (shape.n_step) {
      item.rows = window_steps(flags, item.t, shape.n_step, &item.terminated);
      item.before_end = frames_before(flags, item.t + item.rows, shape.stack);
    } else {
      item.rows = sequence_rows(flags, item.t, shape.length, shape.cross_episodes);
    }
    if (any_at_starts_) item.entry = entries()[slot] - 1;
    for (size_t c = 0; c < columns_.size(); ++c) {  // on their way while the other items are still being drawn
      if (config_.fields[c].at_starts) continue;
      const int64_t bytes = config_.fields[c].row_bytes();
      const char* row = columns_[c].data() + slot * bytes;
      prefetch(row), prefetch(row + 64);
      if (shape.n_step && int(c) == config_.observation)
        prefetch(row + item.rows * bytes), prefetch(row + item.rows * bytes + 64);
    }
    prefetch(reinterpret_cast<const char*>(reward() + slot));
    return item;
  }

  // body(slot, n) for the one or two contiguous pieces of rows [begin, end) of a stream.
  template <class Body>
  void runs(int64_t s, int64_t begin, int64_t end, Body&& body) const {
    if (begin < end) pieces(s, begin % config_.shape.ring, end - begin, body);
  }
  // The same for `count` rows from `place`, which may lie one turn of the ring too low or too high.
  template <class Body>
  void pieces(int64_t s, int64_t place, int64_t count, Body&& body) const {
    const int64_t ring = config_.shape.ring;
    if (place < 0) place += ring;
    if (place >= ring) place -= ring;
    const int64_t n = std::min(count, ring - place);
    body(s * ring + place, n);
    if (n < count) body(s * ring, count - n);
  }

  // To `to`: `zeros` rows of zeros, `count` rows of a column from `place` on, zeros again; of all that, only the rows
  // [part_begin, part_end).
  void copy_padded(char* to, size_t column, int64_t s, int64_t place, int64_t count, int64_t zeros, int64_t part_begin,
                   int64_t part_end, bool past_caches) const {
    const int64_t bytes = config_.fields[column].row_bytes();
    const int64_t first = std::max(part_begin, zeros), last = std::min(part_end, zeros + count);
    if (part_begin < zeros)
      std::memset(to + part_begin * bytes, 0, size_t((std::min(zeros, part_end) - part_begin) * bytes));
    char* next = to + first * bytes;
    if (first < last)
      pieces(s, place + first - zeros, last - first, [&](int64_t slot, int64_t n) {
        const char* from = columns_[column].data() + slot * bytes;
        if (past_caches)
          copy_past_caches(next, from, size_t(n * bytes));
        else
          copy_small(next, from, size_t(n * bytes));
        next += n * bytes;
      });
    const int64_t tail = std::max(part_begin, zeros + count);
    if (tail < part_end) std::memset(to + tail * bytes, 0, size_t((part_end - tail) * bytes));
  }

  void gather(const std::vector<Item>& items, void* const* out) const {
    const ReplayShape& shape = config_.shape;
    const int64_t batch = int64_t(items.size());
    int64_t item_bytes = 64;
    for (size_t c = 0; c < columns_.size(); ++c) {
      const int64_t frames = shape.n_step ? 2 * (config_.stacked(c) ? shape.stack : 1) : shape.length + shape.stack - 1;
      item_bytes += config_.fields[c].row_bytes() * (config_.fields[c].at_starts ? 1 : frames);
    }
    const bool large = batch * item_bytes >= kStreamBatch;
    // An item is cut into slices, so that a few long sequences still occupy every thread.
    const int64_t slices = shape.n_step ? 2 : 16;
    const int64_t grain = std::max<int64_t>(1, kGrain * slices / item_bytes);
    parallel_for(batch * slices, grain, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t i = unit / slices, slice = unit % slices;
        if (shape.n_step)
          gather_window(items[size_t(i)], i, slice, large, out);
        else
          gather_sequence(items[size_t(i)], i, slice, slices, large, out);
      }
      if (large) fence();
    });
  }

  // slice 0: everything at t; slice 1: the observation m steps later.
  void gather_window(const Item& item, int64_t i, int64_t slice, bool large, void* const* out) const {
    const ReplayShape& shape = config_.shape;
    for (size_t c = 0; c < columns_.size(); ++c) {
      const int64_t bytes = config_.fields[c].row_bytes();
      const bool observed = int(c) == config_.observation;
      const int64_t frames = config_.stacked(c) ? shape.stack : 1;
      char* to = static_cast<char*>(*out++) + i * frames * bytes;
      char* next = observed ? static_cast<char*>(*out++) + i * frames * bytes : nullptr;
      const bool past_caches = large && bytes >= kStreamRow;
      const int64_t before = frames > 1 ? item.before : 0, before_end = frames > 1 ? item.before_end : 0;
      if (slice == 0)
        copy_padded(to, c, item.stream, item.place - before, before + 1, frames - 1 - before, 0, frames, past_caches);
      else if (observed)
        copy_padded(next, c, item.stream, item.place + item.rows - before_end, before_end + 1, frames - 1 - before_end,
                    0, frames, past_caches);
    }
    if (slice != 0) return;
    double sum = 0, discount = 1;
    pieces(item.stream, item.place, item.rows, [&](int64_t slot, int64_t n) {
      for (int64_t j = 0; j < n; ++j) sum += discount * double(reward()[slot + j]), discount *= config_.gamma;
    });
    static_cast<float*>(out[0])[i] = float(sum);
    static_cast<float*>(out[1])[i] = item.terminated ? 0.f : float(discount);
    static_cast<int64_t*>(out[2])[i] = item.rows;
  }

  void gather_sequence(const Item& item, int64_t i, int64_t slice, int64_t slices, bool large, void* const* out) const {
    const ReplayShape& shape = config_.shape;
    for (size_t c = 0; c < columns_.size(); ++c) {
      const int64_t bytes = config_.fields[c].row_bytes();
      char* to = static_cast<char*>(*out++);
      if (config_.fields[c].at_starts) {
        if (slice == 0) std::memcpy(to + i * bytes, columns_[c].data() + item.entry * bytes, size_t(bytes));
        continue;
      }
      const int64_t extra = config_.stacked(c) ? shape.stack - 1 : 0, before = config_.stacked(c) ? item.before : 0;
      const int64_t total = shape.length + extra;
      copy_padded(to + i * total * bytes, c, item.stream, item.place - before, before + item.rows, extra - before,
                  total * slice / slices, total * (slice + 1) / slices, large && bytes >= kStreamRow);
    }
    if (slice != slices - 1) return;
    auto* rewards = static_cast<float*>(out[0]) + i * shape.length;
    auto* terminated = static_cast<bool*>(out[1]) + i * shape.length;
    auto* first = static_cast<bool*>(out[2]) + i * shape.length;
    auto* last = static_cast<bool*>(out[3]) + i * shape.length;
    auto* mask = static_cast<bool*>(out[4]) + i * (shape.length - 1);
    uint8_t previous = kLast;
    for (int64_t j = 0; j < shape.length; ++j) {
      const bool real = j < item.rows;
      const int64_t place = real ? item.place + j : item.place;
      const int64_t slot = item.stream * shape.ring + (place < shape.ring ? place : place - shape.ring);
      const uint8_t flags = real ? uint8_t(flags_.data()[slot]) : 0;
      rewards[j] = real ? reward()[slot] : 0.f;
      terminated[j] = flags & kTerminated;
      first[j] = flags & kFirst;
      last[j] = flags & kLast;
      if (j > 0) mask[j - 1] = real && !(previous & kLast) && !(flags & kFirst);
      previous = flags;
    }
  }

  // Files
  // ---------------------------------------------------------------------------------------------------------------
  void write_header(FileWriter& file, const char* magic) const {
    const ReplayShape& shape = config_.shape;
    file.write(magic, 8);
    const int64_t numbers[] = {shape.streams, shape.rows, shape.ring, int64_t(columns_.size())};
    file.write(numbers, sizeof numbers);
  }
  void check_header(FileReader& file, const char* magic) const {
    const ReplayShape& shape = config_.shape;
    char name[8];
    int64_t numbers[4];
    file.read(name, 8);
    if (std::memcmp(name, magic, 8) != 0) file.refuse("is not a file of a saved replay");
    file.read(numbers, sizeof numbers);
    if (numbers[0] != shape.streams || numbers[1] != shape.rows || numbers[2] != shape.ring ||
        numbers[3] != int64_t(columns_.size()))
      file.refuse("was saved by a replay of another shape");
  }

  void write_rows(FileWriter& file, const ReplaySaved& saved) const {
    write_header(file, kRowsMagic);
    for (size_t s = 0; s < saved.from.size(); ++s) {
      const int64_t range[2] = {saved.from[s], saved.to[s]};
      file.write(range, sizeof range);
    }
    for (int64_t s = 0; s < config_.shape.streams; ++s) {
      const int64_t begin = saved.from[size_t(s)], end = saved.to[size_t(s)];
      runs(s, begin, end, [&](int64_t slot, int64_t n) { file.write(flags_.data() + slot, n); });
      runs(s, begin, end, [&](int64_t slot, int64_t n) { file.write(reward() + slot, n * 4); });
      for (size_t c = 0; c < columns_.size(); ++c) {
        const int64_t bytes = config_.fields[c].row_bytes();
        if (!config_.fields[c].at_starts)
          runs(s, begin, end,
               [&](int64_t slot, int64_t n) { file.write(columns_[c].data() + slot * bytes, n * bytes); });
      }
      for (size_t c = 0; c < columns_.size(); ++c)
        for (int64_t t = begin; config_.fields[c].at_starts && t < end; ++t)
          if (entries()[index_->slot(s, t)])
            file.write(start_row(c, index_->slot(s, t)), config_.fields[c].row_bytes());
    }
  }

  std::vector<char> state_bytes() const {  // with mutex_ held
    const ReplayShape& shape = config_.shape;
    std::vector<char> out;
    auto put = [&](const void* data, size_t n) {
      out.insert(out.end(), static_cast<const char*>(data), static_cast<const char*>(data) + n);
    };
    const int64_t numbers[] = {shape.streams, shape.rows, shape.ring, int64_t(columns_.size())};
    put(kStateMagic, 8);
    put(numbers, sizeof numbers);
    put(&draws_, 8);
    put(&stale_, 8);
    put(&max_priority_, 8);
    for (int64_t s = 0; s < shape.streams; ++s) {
      const StreamState& stream = index_->streams()[size_t(s)];
      put(&stream, sizeof stream);
      const int64_t tail = index_->tail(s);
      std::vector<uint8_t> ready(size_t(stream.head - tail + 7) / 8);
      std::vector<uint64_t> leaves;
      for (int64_t t = tail; t < stream.head; ++t) {
        const uint64_t leaf = tree_.leaf(index_->slot(s, t));
        if (leaf == 0) continue;
        ready[size_t(t - tail) / 8] |= uint8_t(1 << ((t - tail) & 7));
        if (given()) leaves.push_back(leaf);
      }
      put(ready.data(), ready.size());
      put(leaves.data(), leaves.size() * 8);
      if (given())
        runs(s, std::min(stream.pending, stream.head), stream.head,
             [&](int64_t slot, int64_t n) { put(given() + slot, size_t(n) * 4); });
    }
    return out;
  }

  ReplayConfig config_;
  int64_t slots_ = 0;
  bool any_at_starts_ = false;
  std::vector<Pages> columns_;
  Pages flags_, reward_, nodes_, given_, entries_;
  std::unique_ptr<ReplayIndex> index_;
  SumTree tree_;
  int64_t items_ = 0, stale_ = 0;
  double max_priority_ = 1.0;
  uint64_t draws_ = 0;
  std::vector<int32_t> free_entries_;
  int32_t last_entry_ = 0;
  std::vector<Update> update_;
  std::vector<Item> drawn_;
  size_t outputs_ = 0;
  std::vector<int8_t> scratch_;
  std::vector<int64_t> counts_, loaded_from_, loaded_to_;

  std::mutex turn_;   // one reader of rows at a time
  std::mutex mutex_;  // everything but the rows of a reader; taken after turn_
  std::condition_variable idle_;
  bool reading_ = false;
  std::vector<int64_t> reading_heads_;
};

}  // namespace

std::vector<ReplayOutput> replay_layout(const ReplayConfig& config, int64_t batch) {
  const ReplayShape& shape = config.shape;
  const bool windows = shape.n_step > 0;
  std::vector<ReplayOutput> out;
  for (size_t i = 0; i < config.fields.size(); ++i) {
    const ReplayField& field = config.fields[i];
    ReplayOutput o{field.name, field.dtype, {batch}};
    if (!windows && !field.at_starts) o.shape.push_back(shape.length + (config.stacked(i) ? shape.stack - 1 : 0));
    o.shape.insert(o.shape.end(), field.shape.begin(), field.shape.end());
    if (windows && config.stacked(i)) o.shape[1] *= shape.stack;
    out.push_back(o);
    if (windows && int(i) == config.observation) {
      o.name = "next_" + o.name;
      out.push_back(o);
    }
  }
  if (windows) {
    out.push_back({"reward", DType::f32, {batch}});
    out.push_back({"discount", DType::f32, {batch}});
    out.push_back({"steps", DType::i64, {batch}});
  } else {
    out.push_back({"reward", DType::f32, {batch, shape.length}});
    for (const char* name : {"terminated", "is_first", "is_last"})
      out.push_back({name, DType::boolean, {batch, shape.length}});
    out.push_back({"mask", DType::boolean, {batch, shape.length - 1}});
  }
  out.push_back({"indices", DType::i64, {batch}});
  out.push_back({"probability", DType::f32, {batch}});
  out.push_back({"weight", DType::f32, {batch}});
  return out;
}

void check_replay_rows(const ReplayIndex& index, const ReplayRows& rows, std::vector<int8_t>& before) {
  const int64_t streams = index.shape().streams;
  before.assign(size_t(streams), -1);  // is_last of a stream's row before, where this call brought it
  for (int64_t i = 0; i < rows.count; ++i) {
    const int64_t s = rows.streams ? rows.streams[i] : i;
    require(s >= 0 && s < streams, "streams", "must lie in 0..", streams - 1, ", got ", s);
    const bool first = *rows.is_first.row<bool>(i);
    const int64_t head = index.head(s);
    const bool opened = before[size_t(s)] >= 0 || head > 0;
    const bool closed =
        before[size_t(s)] >= 0 ? before[size_t(s)] != 0 : opened && (index.flags(s)[head - 1] & kLast) != 0;
    require(first || opened, "is_first", "must be True in the first row of a stream; stream ", s, " has none yet");
    require(first || !closed, "is_first", "must be True in the row after an is_last; in stream ", s, " it is not");
    before[size_t(s)] = *rows.is_last.row<bool>(i) ? 1 : 0;
    if (rows.priority.data) {
      const float p = *rows.priority.row<float>(i);
      require(std::isnan(p) || (p >= 0 && std::isfinite(p)), "priority",
              "must be finite and not negative, or NaN for the highest seen, got ", p);
    }
  }
}

std::unique_ptr<Replay> make_replay_cpu(ReplayConfig config) { return std::make_unique<ReplayCpu>(std::move(config)); }

}  // namespace urlfast
