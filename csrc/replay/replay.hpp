// Sequence replay: rows of many streams in a ring, windows drawn from them uniformly or by priority. No Python, torch
// or CUDA header reaches this file. ReplayIndex (which windows exist) and SumTree (drawing one) are shared by both
// devices.
#pragma once
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/memory.hpp"
#include "common/tensor.hpp"
#include "replay/replay_index.hpp"

struct CUstream_st;  // what cudaStream_t points to

namespace urlfast {

struct ReplayField {
  std::string name;
  DType dtype = DType::f32;
  std::vector<int64_t> shape;  // of one row
  bool at_starts = false;      // kept and returned for a sequence's first row only

  int64_t row_bytes() const {
    int64_t n = item_size(dtype);
    for (int64_t d : shape) n *= d;
    return n;
  }
  double bytes() const {  // the same, of a shape that is not checked yet
    double n = double(item_size(dtype));
    for (int64_t d : shape) n *= double(d);
    return n;
  }
};

struct ReplayConfig {
  ReplayShape shape;  // `ring` is filled in by the replay
  std::vector<ReplayField> fields;
  int observation = -1;  // the field whose frames are stacked, and that n-step batches hold twice; -1: none
  double gamma = 1.0;
  double priority_exponent = 0.0, importance_exponent = 0.0, eta = 0.9;
  uint64_t seed = 0;
  Device device;
  bool file = false;  // columns in an unlinked file under `path` instead of memory
  std::string path;
  int64_t expected_rows = -1;  // rows that will be touched, for the check against free memory; -1: all

  bool stacked(size_t field) const { return int(field) == observation && shape.stack > 1; }
};

// One array of a batch.
struct ReplayOutput {
  std::string name;
  DType dtype;
  std::vector<int64_t> shape;
};

// An array whose rows are contiguous each, `step` bytes apart. Booleans are read as bytes: one that another program
// wrote may be neither 0 nor 1.
struct ReplayColumn {
  const void* data = nullptr;
  int64_t step = 0;
  bool on_device = false;
  template <class T>
  const T* row(int64_t i) const {
    return reinterpret_cast<const T*>(static_cast<const char*>(data) + i * step);
  }
};

// Rows to append, row i to stream streams[i] (null: row i to stream i); fields in the order of the configuration. For a
// replay on a device any of them may lie there but the flags.
struct ReplayRows {
  int64_t count = 0;
  const int64_t* streams = nullptr;
  std::vector<ReplayColumn> fields;
  ReplayColumn reward, terminated, is_first, is_last,
      priority;  // priority.data null: every new item gets the highest one seen
};

struct ReplaySaved {
  std::vector<int64_t> from, to;  // rows [from, to) of every stream
  int64_t rows_bytes = 0, state_bytes = 0;
  uint32_t rows_crc = 0, state_crc = 0;
};

// The operating system refused (a full disk, a missing folder): Python sees OSError with this errno and file name.
struct SystemError : std::runtime_error {
  SystemError(int code_, const std::string& what, std::string file_)
      : std::runtime_error(what), code(code_), file(std::move(file_)) {}
  int code;
  std::string file;
};

// Safe to call from several threads: samplers take turns, and one of them never keeps an adder waiting unless the adder
// would overwrite rows that are being read.
// Arrays lie on the replay's device. On CUDA, add, sample and update_priorities queue their work on `stream` after all
// that was queued before by other calls, and return; on the CPU it is null.
class Replay {
 public:
  virtual ~Replay() = default;
  virtual const ReplayConfig& config() const = 0;
  virtual int64_t bytes() const = 0;
  virtual int64_t size() = 0;        // rows held
  virtual int64_t sampleable() = 0;  // items that can be drawn
  virtual int64_t stale_updates() = 0;
  virtual std::pair<uint64_t, uint64_t> totals() = 0;  // the tree's root, and the sum over its leaves: always equal

  // Throws std::invalid_argument, and appends nothing, when is_first does not follow is_last.
  virtual void add(const ReplayRows& rows, CUstream_st* stream) = 0;
  // out: one pointer for each entry of replay_layout(config(), batch).
  virtual void sample(int64_t batch, void* const* out, CUstream_st* stream) = 0;
  // indices: int64, td: float (batch, steps), mask: bool, like td, or null. steps = 1 for n-step items and
  // length - 1 - burn_in for sequences.
  virtual void update_priorities(int64_t batch, int64_t steps, ReplayColumn indices, ReplayColumn td, ReplayColumn mask,
                                 CUstream_st* stream) = 0;

  // Writes the rows from `from` on (what is still held of them) to one file and everything else to another. An empty
  // rows_path: state alone. Both are synced; a file that could not be completed is removed.
  virtual ReplaySaved save(const std::string& rows_path, const std::string& state_path,
                           const std::vector<int64_t>& from) = 0;
  // Into a fresh replay: row files in the order of their rows, then the state. Throws std::invalid_argument naming the
  // file that is not what was saved.
  virtual void load_rows(const std::string& path, const ReplaySaved& saved) = 0;
  virtual void load_state(const std::string& path, const ReplaySaved& saved) = 0;
};

// The arrays of a batch, in the order in which sample takes them; the last three are indices, probability, weight.
std::vector<ReplayOutput> replay_layout(const ReplayConfig& config, int64_t batch);
// Throws std::invalid_argument unless these rows can follow those the index has. before: scratch.
void check_replay_rows(const ReplayIndex& index, const ReplayRows& rows, std::vector<int8_t>& before);

// Take a configuration that is right in itself (the binding checks it), check the memory it takes, then allocate.
std::unique_ptr<Replay> make_replay_cpu(ReplayConfig config);
std::unique_ptr<Replay> make_replay_cuda(ReplayConfig config);

}  // namespace urlfast
