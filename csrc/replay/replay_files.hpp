// What both devices' replays have in common besides the index: what a batch holds, the check of appended rows, and
// the two kinds of file that a save writes, whose bytes do not tell which device wrote them.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "replay/replay.hpp"
#include "replay/replay_storage.hpp"

namespace urlfast {

// Which entries the columns that are kept at starts give to which slots. Freed ones are used first, so that only as
// many are touched as there ever were starts at one time.
struct ReplayEntries {
  int32_t* of_slot = nullptr;  // 1 + the entry; 0: none. Owned by the replay
  std::vector<int32_t> free;
  int32_t last = 0;

  // Called for a row that was just appended: takes back what the slot's last row had.
  void place(int64_t slot, uint8_t flags) {
    if (int32_t& entry = of_slot[slot]) {
      free.push_back(entry);
      entry = 0;
    }
    if (!(flags & kStart)) return;
    if (free.empty()) {
      of_slot[slot] = ++last;
    } else {
      of_slot[slot] = free.back();
      free.pop_back();
    }
  }
};

// The rows of a device, as far as files need them. Columns by their number; a column that is kept at starts is asked
// for one row, by its entry.
class ReplayMemory {
 public:
  enum : int { kFlagsColumn = -1, kRewardColumn = -2 };
  virtual void write_to(FileWriter& file, int column, int64_t at, int64_t rows) = 0;
  virtual void read_from(FileReader& file, int column, int64_t at, int64_t rows) = 0;
  virtual void loading(int64_t slot) = 0;  // the flags of this slot's row were read: it may need an entry

 protected:
  ~ReplayMemory() = default;
};

struct ReplayCounters {
  uint64_t draws = 0;
  int64_t stale = 0;
  double max_priority = 1.0;
};

// Rows that were loaded so far, of every stream.
struct ReplayLoaded {
  std::vector<int64_t> from, to;
};

// Both files of a save, its rows where rows_path is not empty; fills in their sizes and checksums. Either both stay or
// none.
void write_replay(const std::string& rows_path, const std::string& state_path, const ReplayConfig& config,
                  const std::vector<char>& state, const int32_t* entries, ReplayMemory& memory, ReplaySaved& saved);
void read_replay_rows(FileReader& file, const ReplayConfig& config, const ReplaySaved& saved, const int32_t* entries,
                      ReplayLoaded& loaded, ReplayMemory& memory);

// leaves: of every slot. given: the priorities that came with rows, of every slot; null where they are not kept.
std::vector<char> replay_state(const ReplayConfig& config, const ReplayIndex& index, const ReplayCounters& counters,
                               const uint64_t* leaves, const float* given);
// leaves: zeros, and then what was saved.
void read_replay_state(FileReader& file, const ReplayConfig& config, const ReplayLoaded& loaded, ReplayIndex& index,
                       ReplayCounters& counters, uint64_t* leaves, float* given);

}  // namespace urlfast
