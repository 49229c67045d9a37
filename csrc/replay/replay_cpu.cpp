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
#include "common/cpu.hpp"
#include "common/parallel.hpp"
#include "replay/replay.hpp"
#include "replay/replay_files.hpp"
#include "replay/replay_isa.hpp"
#include "replay/replay_storage.hpp"
#include "replay/sum_tree.hpp"

namespace urlfast {
namespace {

constexpr int64_t kMaxSpare = 64;  // rows a stream may grow by while a batch is being read
// Rows that are worth fetching ahead; and a batch that is stored past the caches, because a smaller one is read from
// them (2 MB of frames copied and then read once: 150 us through the caches, 200 past them; 29 MB: 4200 and 3500).
constexpr int64_t kLongRow = 1 << 10;
constexpr int64_t kStreamBatch = 4 << 20;
constexpr int64_t kGrain = 1 << 17;  // bytes of a batch worth a thread
constexpr uint64_t kPhiloxStream = uint64_t('R') << 56;

const ReplayKernels& kernels() {
  static const ReplayKernels& chosen = URLFAST_PICK(replay_kernels);
  return chosen;
}

// Copies of long rows, each done when the next one is known, so that it can be fetched meanwhile. Past the caches: a
// batch larger than they are is not read before the next thing evicts it, and a store that bypasses them saves reading
// the line it overwrites.
class Copies {
 public:
  explicit Copies(bool past_caches) : past_caches_(past_caches) {}
  void add(char* to, const char* from, int64_t bytes) {
    finish(from);
    to_ = to, from_ = from, bytes_ = bytes;
  }
  void finish(const char* next = nullptr) {
    if (bytes_) copy_(to_, from_, bytes_, next, past_caches_);
    bytes_ = 0;
  }

 private:
  decltype(ReplayKernels::copy) copy_ = kernels().copy;
  bool past_caches_;
  char* to_ = nullptr;
  const char* from_ = nullptr;
  int64_t bytes_ = 0;
};

void prefetch(const void* address) {  // any address: it never faults
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
void copy_short(char* to, const char* from, size_t bytes) {
  if (bytes < 16) return copy_small(to, from, bytes);
  for (size_t i = 0; i + 16 <= bytes; i += 16) std::memcpy(to + i, from + i, 16);
  std::memcpy(to + bytes - 16, from + bytes - 16, 16);
}

// Short rows of a column to places side by side, each asked for while the ones before it are copied.
void copy_rows(char* to, const char* column, const std::vector<int64_t>& slots, size_t first, size_t end,
               size_t bytes) {
  constexpr size_t kAhead = 16;
  for (size_t i = first; i < end; ++i) {
    const char* ahead = column + size_t(slots[std::min(i + kAhead, end - 1)]) * bytes;
    for (size_t line = 0; line < bytes + 63; line += 64) prefetch(ahead + std::min(line, bytes - 1));
    copy_short(to + i * bytes, column + size_t(slots[i]) * bytes, bytes);
  }
}

struct Item {
  int64_t slot;
  int64_t stream, t;
  int64_t place;       // t % ring
  int64_t rows;        // of the sequence; steps of the n-step window
  int64_t before;      // frames of the stack before t that its episode has
  int64_t before_end;  // the same for the row `rows` steps later (n-step)
  int64_t entry;       // where the columns kept at starts have it
  bool terminated;
};

class ReplayCpu final : public Replay, private ReplayMemory {
 public:
  explicit ReplayCpu(ReplayConfig config) : config_(std::move(config)) {
    ReplayShape& shape = config_.shape;
    shape.ring = shape.rows + std::min(kMaxSpare, shape.rows / 256 + 1);
    slots_ = shape.streams * shape.ring;
    tree_ = SumTree(slots_);
    for (const ReplayField& field : config_.fields) any_at_starts_ |= field.at_starts;
    short_rows_ = shape.n_step && shape.stack == 1;
    for (const ReplayField& field : config_.fields) short_rows_ &= field.row_bytes() < kLongRow;
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
    if (any_at_starts_) {
      entry_of_slot_ = Pages(slots_ * 4);
      entries_.of_slot = reinterpret_cast<int32_t*>(entry_of_slot_.data());
    }
    tree_.nodes = reinterpret_cast<uint64_t*>(nodes_.data());
    index_ = std::make_unique<ReplayIndex>(shape, reinterpret_cast<uint8_t*>(flags_.data()));
    outputs_ = replay_layout(config_, 1).size();
    loaded_.from.assign(size_t(shape.streams), 0);
    loaded_.to.assign(size_t(shape.streams), 0);
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
    return counters_.stale;
  }

  std::pair<uint64_t, uint64_t> totals() override {
    std::lock_guard<std::mutex> lock(mutex_);
    uint64_t sum = 0;
    for (int64_t i = 0; i < slots_; ++i) sum += tree_.leaf(i);
    return {tree_.total(), sum};
  }

  void add(const ReplayRows& rows, CUstream_st*) override {
    std::unique_lock<std::mutex> lock(mutex_);
    check_replay_rows(*index_, rows, scratch_);
    if (reading_ && would_overwrite(rows)) {
      ++waiting_;
      idle_.wait(lock, [&] { return !reading_ || !would_overwrite(rows); });
      if (--waiting_ == 0) idle_.notify_all();
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
          uint8_t((*rows.terminated.row<uint8_t>(i) ? kTerminated : 0) | (*rows.is_first.row<uint8_t>(i) ? kFirst : 0) |
                  (*rows.is_last.row<uint8_t>(i) ? kLast : 0));
      index_->append(s, flags, [&](int64_t t, bool ready) { change(s, t, ready); });
      if (!any_at_starts_) continue;
      entries_.place(slot, uint8_t(flags_.data()[slot]));
      if (entries_.of_slot[slot] == 0) continue;
      for (size_t c = 0; c < columns_.size(); ++c)
        if (config_.fields[c].at_starts)
          std::memcpy(start_row(c, slot), rows.fields[c].row<char>(i), size_t(config_.fields[c].row_bytes()));
    }
  }

  void sample(int64_t batch, void* const* out, CUstream_st*) override {
    std::lock_guard<std::mutex> turn(turn_);
    std::vector<Item>& items = drawn_;
    items.resize(static_cast<size_t>(batch));
    auto* indices = static_cast<int64_t*>(out[outputs_ - 3]);
    auto* probability = static_cast<float*>(out[outputs_ - 2]);
    auto* weight = static_cast<float*>(out[outputs_ - 1]);
    {
      std::unique_lock<std::mutex> lock(mutex_);
      let_adders_in(lock);
      const uint64_t total = tree_.total();
      if (total == 0) {
        int64_t held = 0;
        for (const StreamState& s : index_->streams()) held += std::min(s.head, config_.shape.rows);
        throw std::invalid_argument(text("sample: nothing to sample yet: ", held, " rows held, and no complete ",
                                         config_.shape.n_step ? "transition" : "sequence", " among them"));
      }
      const Philox rng{config_.seed, kPhiloxStream | counters_.draws++};
      // In passes, a level of the tree each: no draw waits for its own last step, and what the next pass reads of it is
      // on its way while the others are seen to.
      walks_.resize(size_t(batch));
      for (int64_t i = 0; i < batch; ++i) walks_[size_t(i)] = {tree_draw(rng, uint64_t(i), total)};
      for (int level = tree_.levels - 2; level >= 0; --level)
        for (SumTree::Walk& walk : walks_) {
          tree_.descend(walk, level);
          if (level == 0) continue;
          const uint64_t* next = tree_.children(level - 1, walk.node);
          prefetch(next), prefetch(next + 8);
        }
      for (int64_t i = 0; i < batch; ++i) {
        items[size_t(i)].slot = walks_[size_t(i)].node;
        prefetch(flags_.data() + walks_[size_t(i)].node);
      }
      float most = 0;
      for (int64_t i = 0; i < batch; ++i) {
        Item& item = items[size_t(i)];
        describe(item);
        const double p = double(tree_.leaf(item.slot)) / double(total);
        indices[i] = item.t * config_.shape.streams + item.stream;
        probability[i] = float(p);
        const double w =
            config_.importance_exponent == 0 ? 1.0 : std::pow(double(items_) * p, -config_.importance_exponent);
        weight[i] = float(w);
        most = std::max(most, weight[i]);
      }
      for (int64_t i = 0; i < batch; ++i) weight[i] /= most;
      begin_reading();
    }
    const Reading reading{this};
    gather(items, out);
  }

  void update_priorities(int64_t batch, int64_t steps, ReplayColumn indices, ReplayColumn td, ReplayColumn mask,
                         CUstream_st*) override {
    const ReplayShape& shape = config_.shape;
    std::lock_guard<std::mutex> lock(mutex_);
    update_.resize(static_cast<size_t>(batch));
    for (int64_t i = 0; i < batch; ++i) {
      const int64_t index = *indices.row<int64_t>(i), s = index % shape.streams, t = index / shape.streams;
      require(index >= 0 && t < index_->head(s), "indices", "must be those of a sampled batch, got ", index);
      Update& update = update_[size_t(i)];
      update.priority = -1;
      update.slot = -1;
      const int64_t slot = index_->slot(s, t);
      if (t < index_->tail(s) || tree_.leaf(slot) == 0) continue;
      update.slot = slot;
      const ReplayErrors e = mask.data ? kernels().errors(td.row<float>(i), mask.row<uint8_t>(i), steps)
                                       : errors_of(td.row<float>(i), steps, index_->flags(s), t);
      require(std::isfinite(e.sum), "td", "must be finite where it counts, got NaN or infinity in row ", i);
      if (e.count)
        update.priority =
            shape.n_step ? double(e.most) : config_.eta * double(e.most) + (1 - config_.eta) * e.sum / double(e.count);
    }
    for (const Update& update : update_) {
      if (update.slot < 0)
        ++counters_.stale;
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
      std::unique_lock<std::mutex> lock(mutex_);
      let_adders_in(lock);
      for (int64_t s = 0; s < shape.streams; ++s) {
        const int64_t head = index_->head(s);
        saved.to.push_back(head);
        saved.from.push_back(std::clamp(from[size_t(s)], index_->tail(s), head));
      }
      state = replay_state(config_, *index_, counters_, tree_.nodes, given());
      begin_reading();
    }
    const Reading reading{this};
    write_replay(rows_path, state_path, config_, state, entries_.of_slot, *this, saved);
    return saved;
  }

  void load_rows(const std::string& path, const ReplaySaved& saved) override {
    std::lock_guard<std::mutex> lock(mutex_);
    FileReader file(path, saved.rows_bytes, saved.rows_crc);
    read_replay_rows(file, config_, saved, entries_.of_slot, loaded_, *this);
  }

  void load_state(const std::string& path, const ReplaySaved& saved) override {
    std::lock_guard<std::mutex> lock(mutex_);
    FileReader file(path, saved.state_bytes, saved.state_crc);
    const Pages pages(slots_ * 8);  // touched only where rows are held
    auto* leaves = reinterpret_cast<uint64_t*>(pages.data());
    read_replay_state(file, config_, loaded_, *index_, counters_, leaves, given());
    for (int64_t s = 0; s < config_.shape.streams; ++s)
      for (int64_t t = index_->tail(s); t < index_->head(s); ++t)
        if (const int64_t slot = index_->slot(s, t); leaves[slot]) tree_.set(slot, leaves[slot]), ++items_;
  }

 private:
  float* reward() const { return reinterpret_cast<float*>(reward_.data()); }
  float* given() const { return reinterpret_cast<float*>(given_.data()); }
  char* start_row(size_t c, int64_t slot) const {
    return columns_[c].data() + int64_t(entries_.of_slot[slot] - 1) * config_.fields[c].row_bytes();
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

  // With turn_ held, before a reading begins: readers in a row would keep out an adder that waits for one's end.
  void let_adders_in(std::unique_lock<std::mutex>& lock) {
    idle_.wait(lock, [&] { return waiting_ == 0; });
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

  struct Reading {  // however it ends, adders go on
    ReplayCpu* replay;
    ~Reading() { replay->end_reading(); }
  };

  struct Update {
    int64_t slot;     // -1: the item is gone
    double priority;  // -1: as it is
  };

  // The errors of the transitions that exist after the burn-in of the item at t.
  ReplayErrors errors_of(const float* td, int64_t steps, FlagRing flags, int64_t t) {
    const ReplayShape& shape = config_.shape;
    if (shape.n_step) return kernels().errors(td, nullptr, 1);
    if (!shape.cross_episodes) {
      const int64_t rows = sequence_rows(flags, t, shape.length, false);
      return kernels().errors(td, nullptr, std::min(steps, rows - 1 - shape.burn_in));
    }
    exist_.resize(size_t(steps));
    for (int64_t j = 0; j < steps; ++j) exist_[size_t(j)] = transition_exists(flags, t + shape.burn_in + j);
    return kernels().errors(td, exist_.data(), steps);
  }

  uint64_t leaf_of(double priority) {
    counters_.max_priority = std::max(counters_.max_priority, priority);
    return tree_weight(std::pow(priority, config_.priority_exponent), slots_);
  }

  void change(int64_t s, int64_t t, bool ready) {
    const int64_t slot = index_->slot(s, t);
    const bool was = tree_.leaf(slot) != 0;
    uint64_t leaf = ready ? 1 : 0;
    if (ready && given()) leaf = leaf_of(std::isnan(given()[slot]) ? counters_.max_priority : double(given()[slot]));
    tree_.set(slot, leaf);
    items_ += int64_t(leaf != 0) - int64_t(was);
  }

  // All but item.slot, which is given.
  void describe(Item& item) const {
    const ReplayShape& shape = config_.shape;
    const int64_t slot = item.slot;
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
    if (any_at_starts_) item.entry = entries_.of_slot[slot] - 1;
    for (size_t c = 0; c < columns_.size() && !short_rows_; ++c) {  // on their way while the other items are described
      const int64_t bytes = config_.fields[c].row_bytes();
      if (config_.fields[c].at_starts || bytes >= kLongRow) continue;
      const char* row = columns_[c].data() + slot * bytes;
      prefetch(row), prefetch(row + 64);
      if (shape.n_step && int(c) == config_.observation)
        prefetch(row + item.rows * bytes), prefetch(row + item.rows * bytes + 64);
    }
    prefetch(reward() + slot);
  }

  // body(slot, n) for the one or two contiguous pieces of `count` rows from `place`, which may lie one turn of the ring
  // too low or too high.
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
                   int64_t part_end, Copies& copies) const {
    const int64_t bytes = config_.fields[column].row_bytes();
    const int64_t first = std::max(part_begin, zeros), last = std::min(part_end, zeros + count);
    if (part_begin < zeros)
      std::memset(to + part_begin * bytes, 0, size_t((std::min(zeros, part_end) - part_begin) * bytes));
    char* next = to + first * bytes;
    if (first < last)
      pieces(s, place + first - zeros, last - first, [&](int64_t slot, int64_t n) {
        const char* from = columns_[column].data() + slot * bytes;
        if (bytes >= kLongRow)
          copies.add(next, from, n * bytes);
        else
          copy_small(next, from, size_t(n * bytes));
        next += n * bytes;
      });
    const int64_t tail = std::max(part_begin, zeros + count);
    if (tail < part_end) std::memset(to + tail * bytes, 0, size_t((part_end - tail) * bytes));
  }

  void gather(const std::vector<Item>& items, void* const* out) {
    const ReplayShape& shape = config_.shape;
    const int64_t batch = int64_t(items.size());
    int64_t item_bytes = 64;
    for (size_t c = 0; c < columns_.size(); ++c) {
      const int64_t frames = shape.n_step ? 2 * (config_.stacked(c) ? shape.stack : 1) : shape.length + shape.stack - 1;
      item_bytes += config_.fields[c].row_bytes() * (config_.fields[c].at_starts ? 1 : frames);
    }
    if (short_rows_) return gather_short_rows(items, out, std::max<int64_t>(1, kGrain / item_bytes));
    const bool large = batch * item_bytes >= kStreamBatch;
    // An item is cut into slices, so that a few long sequences still occupy every thread.
    const int64_t slices = shape.n_step ? 2 : 16;
    const int64_t grain = std::max<int64_t>(1, kGrain * slices / item_bytes);
    parallel_for(batch * slices, grain, [&](int64_t begin, int64_t end) {
      Copies copies(large);
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t i = unit / slices, slice = unit % slices;
        if (shape.n_step)
          gather_window(items[size_t(i)], i, slice, copies, out);
        else
          gather_sequence(items[size_t(i)], i, slice, slices, copies, out);
      }
      copies.finish();
      if (large) fence();
    });
  }

  // The same column by column where windows are single short rows: the way to a row costs more than its bytes.
  void gather_short_rows(const std::vector<Item>& items, void* const* out, int64_t grain) {
    const ReplayShape& shape = config_.shape;
    first_.resize(items.size()), last_.resize(items.size());
    for (size_t i = 0; i < items.size(); ++i) {
      const int64_t place = items[i].place + items[i].rows;
      first_[i] = items[i].slot;
      last_[i] = items[i].stream * shape.ring + (place < shape.ring ? place : place - shape.ring);
    }
    parallel_for(int64_t(items.size()), grain, [&](int64_t begin, int64_t end) {
      void* const* to = out;
      for (size_t c = 0; c < columns_.size(); ++c) {
        const auto bytes = size_t(config_.fields[c].row_bytes());
        copy_rows(static_cast<char*>(*to++), columns_[c].data(), first_, size_t(begin), size_t(end), bytes);
        if (int(c) == config_.observation)
          copy_rows(static_cast<char*>(*to++), columns_[c].data(), last_, size_t(begin), size_t(end), bytes);
      }
      for (int64_t i = begin; i < end; ++i) gather_return(items[size_t(i)], i, to);
    });
  }

  // slice 0: everything at t; slice 1: the observation m steps later.
  void gather_window(const Item& item, int64_t i, int64_t slice, Copies& copies, void* const* out) const {
    const ReplayShape& shape = config_.shape;
    for (size_t c = 0; c < columns_.size(); ++c) {
      const int64_t bytes = config_.fields[c].row_bytes();
      const bool observed = int(c) == config_.observation;
      const int64_t frames = config_.stacked(c) ? shape.stack : 1;
      char* to = static_cast<char*>(*out++) + i * frames * bytes;
      char* next = observed ? static_cast<char*>(*out++) + i * frames * bytes : nullptr;
      const int64_t before = frames > 1 ? item.before : 0, before_end = frames > 1 ? item.before_end : 0;
      if (slice == 0)
        copy_padded(to, c, item.stream, item.place - before, before + 1, frames - 1 - before, 0, frames, copies);
      else if (observed)
        copy_padded(next, c, item.stream, item.place + item.rows - before_end, before_end + 1, frames - 1 - before_end,
                    0, frames, copies);
    }
    if (slice == 0) gather_return(item, i, out);
  }

  void gather_return(const Item& item, int64_t i, void* const* out) const {
    double sum = 0, discount = 1;
    pieces(item.stream, item.place, item.rows, [&](int64_t slot, int64_t n) {
      for (int64_t j = 0; j < n; ++j) sum += discount * double(reward()[slot + j]), discount *= config_.gamma;
    });
    static_cast<float*>(out[0])[i] = float(sum);
    static_cast<float*>(out[1])[i] = item.terminated ? 0.f : float(discount);
    static_cast<int64_t*>(out[2])[i] = item.rows;
  }

  void gather_sequence(const Item& item, int64_t i, int64_t slice, int64_t slices, Copies& copies,
                       void* const* out) const {
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
                  total * slice / slices, total * (slice + 1) / slices, copies);
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

  // n rows of a column from a slot on; of one kept at starts, from an entry on.
  std::pair<char*, int64_t> memory(int column, int64_t from, int64_t rows) const {
    if (column == kFlagsColumn) return {flags_.data() + from, rows};
    if (column == kRewardColumn) return {reward_.data() + from * 4, rows * 4};
    const int64_t bytes = config_.fields[size_t(column)].row_bytes();
    return {columns_[size_t(column)].data() + from * bytes, rows * bytes};
  }
  void write_to(FileWriter& file, int column, int64_t from, int64_t rows) override {
    const auto [data, bytes] = memory(column, from, rows);
    file.write(data, bytes);
  }
  void read_from(FileReader& file, int column, int64_t from, int64_t rows) override {
    const auto [data, bytes] = memory(column, from, rows);
    file.read(data, bytes);
  }
  void loading(int64_t slot) override { entries_.place(slot, uint8_t(flags_.data()[slot])); }

  ReplayConfig config_;
  int64_t slots_ = 0;
  bool any_at_starts_ = false;
  bool short_rows_ = false;  // windows of single rows that are not worth fetching ahead
  std::vector<Pages> columns_;
  Pages flags_, reward_, nodes_, given_, entry_of_slot_;
  std::unique_ptr<ReplayIndex> index_;
  SumTree tree_;
  int64_t items_ = 0;
  ReplayCounters counters_;
  ReplayEntries entries_;
  std::vector<Update> update_;
  std::vector<SumTree::Walk> walks_;
  std::vector<Item> drawn_;
  std::vector<int64_t> first_, last_;  // slots of a window's ends
  size_t outputs_ = 0;
  std::vector<int8_t> scratch_;
  std::vector<uint8_t> exist_;
  std::vector<int64_t> counts_;
  ReplayLoaded loaded_;

  std::mutex turn_;   // one reader of rows at a time
  std::mutex mutex_;  // everything but the rows of a reader; taken after turn_
  std::condition_variable idle_;
  bool reading_ = false;
  int waiting_ = 0;  // adders that wait for the end of a reading
  std::vector<int64_t> reading_heads_;
};

}  // namespace

std::unique_ptr<Replay> make_replay_cpu(ReplayConfig config) { return std::make_unique<ReplayCpu>(std::move(config)); }

}  // namespace urlfast
