#include "replay/replay_files.hpp"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/check.hpp"

namespace urlfast {
namespace {

constexpr char kRowsMagic[9] = "URLFRPR1", kStateMagic[9] = "URLFRPS1";

struct Header {
  int64_t numbers[4];
  explicit Header(const ReplayConfig& c)
      : numbers{c.shape.streams, c.shape.rows, c.shape.ring, int64_t(c.fields.size())} {}
};

void check_header(FileReader& file, const ReplayConfig& config, const char* magic) {
  const Header expected(config);
  Header got = expected;
  char name[8];
  file.read(name, 8);
  if (std::memcmp(name, magic, 8) != 0) file.refuse("is not a file of a saved replay");
  file.read(got.numbers, sizeof got.numbers);
  if (!std::equal(got.numbers, got.numbers + 4, expected.numbers))
    file.refuse("was saved by a replay of another shape");
}

// body(column, at, rows) for all that a stream's rows [begin, end) have, in the order of the files.
template <class Body>
void columns_of(const ReplayConfig& config, int64_t s, int64_t begin, int64_t end, Body&& body) {
  const ReplayShape& shape = config.shape;
  for_runs(shape, s, begin, end, [&](int64_t slot, int64_t n) { body(ReplayMemory::kRewardColumn, slot, n); });
  for (size_t c = 0; c < config.fields.size(); ++c)
    if (!config.fields[c].at_starts)
      for_runs(shape, s, begin, end, [&](int64_t slot, int64_t n) { body(int(c), slot, n); });
}

template <class Body>
void starts_of(const ReplayConfig& config, int64_t s, int64_t begin, int64_t end, const int32_t* entries, Body&& body) {
  for (size_t c = 0; c < config.fields.size(); ++c)
    for (int64_t t = begin; config.fields[c].at_starts && t < end; ++t)
      if (const int32_t entry = entries[s * config.shape.ring + t % config.shape.ring]) body(int(c), entry - 1, 1);
}

void write_rows(FileWriter& file, const ReplayConfig& config, const ReplaySaved& saved, const int32_t* entries,
                ReplayMemory& memory) {
  const Header header(config);
  file.write(kRowsMagic, 8);
  file.write(header.numbers, sizeof header.numbers);
  for (size_t s = 0; s < saved.from.size(); ++s) {
    const int64_t range[2] = {saved.from[s], saved.to[s]};
    file.write(range, sizeof range);
  }
  for (int64_t s = 0; s < config.shape.streams; ++s) {
    const int64_t begin = saved.from[size_t(s)], end = saved.to[size_t(s)];
    auto write = [&](int column, int64_t at, int64_t rows) { memory.write_to(file, column, at, rows); };
    for_runs(config.shape, s, begin, end, [&](int64_t slot, int64_t n) { write(ReplayMemory::kFlagsColumn, slot, n); });
    columns_of(config, s, begin, end, write);
    if (entries) starts_of(config, s, begin, end, entries, write);
  }
}

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

void check_replay_rows(const ReplayIndex& index, const ReplayRows& rows, std::vector<int8_t>& last) {
  const int64_t streams = index.shape().streams;
  last.assign(size_t(streams), -1);  // is_last of the row before, where this call brought it
  for (int64_t i = 0; i < rows.count; ++i) {
    const int64_t s = rows.streams ? rows.streams[i] : i;
    require(s >= 0 && s < streams, "streams", "must lie in 0..", streams - 1, ", got ", s);
    const bool first = *rows.is_first.row<uint8_t>(i) != 0;
    const int64_t head = index.head(s);
    const bool opened = last[size_t(s)] >= 0 || head > 0;
    const bool closed = last[size_t(s)] >= 0 ? last[size_t(s)] != 0 : opened && (index.flags(s)[head - 1] & kLast) != 0;
    require(first || opened, "is_first", "must be True in the first row of a stream; stream ", s, " has none yet");
    require(first || !closed, "is_first", "must be True in the row after an is_last; in stream ", s, " it is not");
    last[size_t(s)] = *rows.is_last.row<uint8_t>(i) ? 1 : 0;
    if (rows.priority.data && !rows.priority.on_device) {
      const float p = *rows.priority.row<float>(i);
      require(std::isnan(p) || (p >= 0 && std::isfinite(p)), "priority",
              "must be finite and not negative, or NaN for the highest seen, got ", p);
    }
  }
}

void write_replay(const std::string& rows_path, const std::string& state_path, const ReplayConfig& config,
                  const std::vector<char>& state, const int32_t* entries, ReplayMemory& memory, ReplaySaved& saved) {
  FileWriter state_file(state_path);
  state_file.write(state.data(), int64_t(state.size()));
  if (!rows_path.empty()) {
    FileWriter rows_file(rows_path);
    write_rows(rows_file, config, saved, entries, memory);
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
}

void read_replay_rows(FileReader& file, const ReplayConfig& config, const ReplaySaved& saved, const int32_t* entries,
                      ReplayLoaded& loaded, ReplayMemory& memory) {
  check_header(file, config, kRowsMagic);
  for (int64_t s = 0; s < config.shape.streams; ++s) {
    int64_t range[2];
    file.read(range, sizeof range);
    if (range[0] != saved.from[size_t(s)] || range[1] != saved.to[size_t(s)] || range[0] < 0 || range[0] > range[1] ||
        range[1] > (int64_t(1) << 40))
      file.refuse("is damaged: it holds other rows than the manifest says");
  }
  for (int64_t s = 0; s < config.shape.streams; ++s) {
    const int64_t begin = saved.from[size_t(s)], end = saved.to[size_t(s)];
    int64_t &from = loaded.from[size_t(s)], &to = loaded.to[size_t(s)];
    if (begin < to) file.refuse("is damaged: its rows are not newer than those before it");
    if (begin > to) from = begin;
    to = end;
    auto read = [&](int column, int64_t at, int64_t rows) { memory.read_from(file, column, at, rows); };
    for_runs(config.shape, s, begin, end, [&](int64_t slot, int64_t n) { read(ReplayMemory::kFlagsColumn, slot, n); });
    columns_of(config, s, begin, end, read);
    if (!entries) continue;
    for (int64_t t = begin; t < end; ++t) memory.loading(s * config.shape.ring + t % config.shape.ring);
    starts_of(config, s, begin, end, entries, read);
  }
  file.finish();
}

std::vector<char> replay_state(const ReplayConfig& config, const ReplayIndex& index, const ReplayCounters& counters,
                               const uint64_t* leaves, const float* given) {
  std::vector<char> out;
  auto put = [&](const void* data, size_t n) {
    out.insert(out.end(), static_cast<const char*>(data), static_cast<const char*>(data) + n);
  };
  const Header header(config);
  put(kStateMagic, 8);
  put(header.numbers, sizeof header.numbers);
  put(&counters.draws, 8);
  put(&counters.stale, 8);
  put(&counters.max_priority, 8);
  for (int64_t s = 0; s < config.shape.streams; ++s) {
    const StreamState& stream = index.streams()[size_t(s)];
    put(&stream, sizeof stream);
    const int64_t tail = index.tail(s);
    std::vector<uint8_t> ready(size_t(stream.head - tail + 7) / 8);
    std::vector<uint64_t> kept;
    for (int64_t t = tail; t < stream.head; ++t) {
      const uint64_t leaf = leaves[index.slot(s, t)];
      if (leaf == 0) continue;
      ready[size_t(t - tail) / 8] |= uint8_t(1 << ((t - tail) & 7));
      if (given) kept.push_back(leaf);
    }
    put(ready.data(), ready.size());
    put(kept.data(), kept.size() * 8);
    if (given)
      for_runs(config.shape, s, std::min(stream.pending, stream.head), stream.head,
               [&](int64_t slot, int64_t n) { put(given + slot, size_t(n) * 4); });
  }
  return out;
}

void read_replay_state(FileReader& file, const ReplayConfig& config, const ReplayLoaded& loaded, ReplayIndex& index,
                       ReplayCounters& counters, uint64_t* leaves, float* given) {
  const ReplayShape& shape = config.shape;
  check_header(file, config, kStateMagic);
  file.read(&counters.draws, 8);
  file.read(&counters.stale, 8);
  file.read(&counters.max_priority, 8);
  if (!(counters.max_priority > 0) || !std::isfinite(counters.max_priority))
    file.refuse("is damaged: its highest priority is not one");
  const uint64_t most = (uint64_t(1) << 63) / uint64_t(shape.streams * shape.ring);
  for (int64_t s = 0; s < shape.streams; ++s) {
    StreamState& stream = index.streams()[size_t(s)];
    file.read(&stream, sizeof stream);
    const int64_t tail = index.tail(s);
    if (stream.head < 0 || stream.head != loaded.to[size_t(s)] || (stream.head > 0 && loaded.from[size_t(s)] > tail) ||
        stream.episode < 0 || stream.episode > stream.head || stream.pending < tail ||
        stream.pending > stream.head + shape.stride)
      file.refuse("is damaged: it does not fit the rows that were loaded");
    std::vector<uint8_t> ready(size_t(stream.head - tail + 7) / 8);
    file.read(ready.data(), int64_t(ready.size()));
    for (int64_t t = tail; t < stream.head; ++t) {
      if (!(ready[size_t(t - tail) / 8] >> ((t - tail) & 7) & 1)) continue;
      uint64_t leaf = 1;
      if (given) file.read(&leaf, 8);
      if (leaf == 0 || leaf > most) file.refuse("is damaged: a priority is out of range");
      leaves[index.slot(s, t)] = leaf;
    }
    if (given)
      for_runs(shape, s, std::min(stream.pending, stream.head), stream.head,
               [&](int64_t slot, int64_t n) { file.read(given + slot, n * 4); });
  }
  file.finish();
}

}  // namespace urlfast
