// Which windows a ring of rows holds. The window functions are built by both compilers; the bookkeeping of appended
// rows runs on the host, which sees every flag before the device does.
//
// Row t of stream s lies in slot s * ring + t % ring. A stream keeps its newest `rows` rows; `ring` is a little larger,
// so that rows being read are not overwritten while a few more arrive. An item (a transition's window or a sequence) is
// named by its first row: index = t * streams + s, whose slot is t % ring and whose generation is t / ring.
#pragma once
#include <cstdint>
#include <cstring>
#include <vector>

#include "common/random.hpp"

namespace urlfast {

enum RowFlag : uint8_t {
  kTerminated = 1,
  kFirst = 2,
  kLast = 4,
  kStart = 8,  // a sequence may begin here: a multiple of `stride` after its episode's first row
};

struct ReplayShape {
  int64_t streams = 1;
  int64_t rows = 0;    // a stream keeps these
  int64_t ring = 0;    // and has room for these
  int64_t n_step = 0;  // 0: sequences
  int64_t length = 0;  // rows of a sequence
  int64_t stride = 1;
  int64_t burn_in = 0;
  int64_t stack = 1;  // frames of an observation
  bool cross_episodes = false;
};

// The rows of one stream's flags in the ring.
struct FlagRing {
  const uint8_t* flags;
  int64_t ring;
  URLFAST_HD uint8_t operator[](int64_t t) const { return flags[t % ring]; }
};

// The newest row of a stream that lies at `position` in its ring; negative where none does.
URLFAST_HD static inline int64_t row_at(int64_t head, int64_t position, int64_t ring) {
  const int64_t back = (head - 1 - position) % ring;
  return head - 1 - (back < 0 ? back + ring : back);
}

// Earlier frames that belong to row t's stack: at most `stack` - 1, none before the episode's first row.
URLFAST_HD static inline int64_t frames_before(FlagRing flags, int64_t t, int64_t stack) {
  int64_t n = 0;
  while (n + 1 < stack && !(flags[t - n] & kFirst)) ++n;
  return n;
}

// o_t --> o_{t+1} exists. Both rows must be in the ring.
URLFAST_HD static inline bool transition_exists(FlagRing flags, int64_t t) {
  return !(flags[t] & kLast) && !(flags[t + 1] & kFirst);
}

// Steps of the n-step window that starts at t: min(n, steps to the episode's end, steps to a terminated one).
// The window must be complete, so a row beyond it is looked at only where it is known to be there.
URLFAST_HD static inline int64_t window_steps(FlagRing flags, int64_t t, int64_t n, bool* terminated) {
  int64_t place = t % flags.ring;  // one division: this runs for every draw
  uint8_t flag = flags.flags[place];
  *terminated = false;
  for (int64_t m = 0; m < n; ++m) {
    if (flag & kLast) return m;
    if (++place == flags.ring) place = 0;
    const uint8_t next = flags.flags[place];
    if (next & kFirst) return m;
    if (flag & kTerminated) {
      *terminated = true;
      return m + 1;
    }
    flag = next;
  }
  return n;
}

// No episode ends between these 8 * Words rows and the ones that follow them.
template <int Words>
URLFAST_HD static inline bool goes_on(const uint8_t* flags) {
  uint64_t here[Words], next[Words], ends = 0;
  std::memcpy(here, flags, sizeof here);
  std::memcpy(next, flags + 1, sizeof next);
  for (int i = 0; i < Words; ++i)
    ends |= (here[i] & 0x0101010101010101u * kLast) | (next[i] & 0x0101010101010101u * kFirst);
  return !ends;
}

// Rows of the complete sequence that starts at t: `length`, or fewer where its episode ends.
URLFAST_HD static inline int64_t sequence_rows(FlagRing flags, int64_t t, int64_t length, bool cross_episodes) {
  if (cross_episodes) return length;
  int64_t place = t % flags.ring;
  for (int64_t k = 1; k < length; ++k) {
#if !defined(__CUDA_ARCH__)
    const uint8_t* f = flags.flags;  // many rows at a time where nothing ends; the last eight may be seen twice
    for (; k + 32 <= length && place + 33 <= flags.ring && goes_on<4>(f + place); k += 32) place += 32;
    for (; k + 8 <= length && place + 9 <= flags.ring && goes_on<1>(f + place); k += 8) place += 8;
    const int64_t back = k + 8 - length;
    if (back > 0 && back < k && back <= place && place - back + 9 <= flags.ring && goes_on<1>(f + place - back)) break;
#endif
    if (flags.flags[place] & kLast) return k;
    if (++place == flags.ring) place = 0;
    if (flags.flags[place] & kFirst) return k;
  }
  return length;
}

// body(slot, n) for the one or two contiguous pieces of rows [begin, end) of a stream.
template <class Body>
void for_runs(const ReplayShape& shape, int64_t s, int64_t begin, int64_t end, Body&& body) {
  while (begin < end) {
    const int64_t position = begin % shape.ring;
    const int64_t n = end - begin < shape.ring - position ? end - begin : shape.ring - position;
    body(s * shape.ring + position, n);
    begin += n;
  }
}

// What one stream is doing. Everything a resumed replay needs besides the flags themselves.
struct StreamState {
  int64_t head = 0;     // rows ever appended
  int64_t episode = 0;  // first row of the running episode
  int64_t pending = 0;  // the oldest start whose window is not complete yet
};

class ReplayIndex {
 public:
  ReplayIndex(const ReplayShape& shape, uint8_t* flags)
      : shape_(shape), flags_(flags), streams_(size_t(shape.streams)) {}

  const ReplayShape& shape() const { return shape_; }
  const std::vector<StreamState>& streams() const { return streams_; }
  std::vector<StreamState>& streams() { return streams_; }
  FlagRing flags(int64_t s) const { return {flags_ + s * shape_.ring, shape_.ring}; }
  int64_t head(int64_t s) const { return streams_[size_t(s)].head; }
  int64_t tail(int64_t s) const { return head(s) > shape_.rows ? head(s) - shape_.rows : 0; }
  int64_t slot(int64_t s, int64_t t) const { return s * shape_.ring + t % shape_.ring; }
  // The newest row of stream slot / ring that lies in this slot.
  int64_t row_of_slot(int64_t slot) const { return row_at(head(slot / shape_.ring), slot % shape_.ring, shape_.ring); }

  // Appends a row with these flags and calls change(t, ready) for every start of the stream that it completes (true) or
  // that loses a row it needs (false).
  template <class Change>
  void append(int64_t s, uint8_t flags, Change&& change) {
    StreamState& stream = streams_[size_t(s)];
    const int64_t t = stream.head++;
    if (flags & kFirst && !shape_.cross_episodes) stream.episode = t;
    if ((t - stream.episode) % shape_.stride == 0) flags |= kStart;
    flags_[slot(s, t)] = flags;
    const FlagRing row = this->flags(s);

    if (const int64_t gone = t - shape_.rows; gone >= 0)  // its own item, and those whose stacks reach back to it
      for (int64_t q = gone; q < t && q < gone + shape_.stack && (q == gone || !(row[q] & kFirst)); ++q)
        change(q, false);

    if (shape_.n_step)
      windows(stream, row, t, change);
    else
      sequences(stream, row, t, change);
  }

 private:
  template <class Change>
  void windows(StreamState& stream, FlagRing row, int64_t t, Change& change) {
    auto complete_before = [&](int64_t end) {
      for (; stream.pending < end; ++stream.pending) change(stream.pending, true);
    };
    if (row[t] & kFirst) {
      complete_before(t - 1);  // a cut: row t-1 closed its episode without saying so
      stream.pending = t;
    } else {
      if (row[t - 1] & kTerminated) complete_before(t);
      complete_before(row[t] & kLast ? t : t - shape_.n_step + 1);
    }
    if (row[t] & kLast) stream.pending = t + 1;
  }

  template <class Change>
  void sequences(StreamState& stream, FlagRing row, int64_t t, Change& change) {
    auto close = [&](int64_t last) {  // a tail counts when a transition is left to learn from after the burn-in
      for (; stream.pending + shape_.burn_in < last; stream.pending += shape_.stride) change(stream.pending, true);
    };
    if (!shape_.cross_episodes && row[t] & kFirst) {
      close(t - 1);
      stream.pending = t;
    }
    if (t - stream.pending + 1 == shape_.length) {
      change(stream.pending, true);
      stream.pending += shape_.stride;
    }
    if (!shape_.cross_episodes && row[t] & kLast) {
      close(t);
      stream.pending = t + 1;
    }
  }

  ReplayShape shape_;
  uint8_t* flags_;
  std::vector<StreamState> streams_;
};

}  // namespace urlfast
