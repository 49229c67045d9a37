// What the replay does on a device: rows appended, leaves changed, items drawn, batches gathered, priorities updated.
// A warp works on one item or copies one piece of one row; nothing here waits for the host, and every launch covers all
// columns and all rows of a call. Included by replay_cuda.cu alone.
#pragma once
#include <cstdint>

#include "replay/replay_index.hpp"
#include "replay/sum_tree.hpp"

namespace urlfast {
namespace {

constexpr unsigned kWarp = 0xffffffffu;
constexpr int kThreads = 256;         // of a block, eight warps
constexpr int64_t kPiece = 8192;      // bytes of a row that one warp copies
constexpr int kMaxColumns = 24;       // of one launch: its table travels as an argument
constexpr int kChangeThreads = 1024;  // of the one block that changes leaves by priority

struct DeviceCounters {
  unsigned long long max_priority;  // bits of a double: positive ones order as integers do
  unsigned long long stale;
  uint32_t highest[2];  // bits of the largest weight of a batch; draws take turns
};

// The replay's memory on the device, and what shapes it. Passed by value.
struct DeviceReplay {
  ReplayShape shape;
  SumTree tree;
  int64_t slots;
  uint8_t* flags;
  float* reward;
  int64_t* heads;    // rows ever appended, of every stream
  float* given;      // the priority that came with a row, NaN for the highest seen; null without priorities
  uint32_t* claims;  // 1 + the last position of a batch of updates that names this slot, while one runs
  int32_t* entries;  // 1 + where the columns kept at starts have this slot's row; null where there are none
  DeviceCounters* counters;
  double priority_exponent, eta, gamma;

  URLFAST_HD FlagRing flags_of(int64_t s) const { return {flags + s * shape.ring, shape.ring}; }
  URLFAST_HD int64_t slot(int64_t s, int64_t t) const { return s * shape.ring + t % shape.ring; }
  URLFAST_HD bool holds(int64_t s, int64_t t) const {
    return t >= heads[s] - shape.rows && t < heads[s] && tree.leaf(slot(s, t)) != 0;
  }
};

__device__ inline int lane() { return int(threadIdx.x & 31); }
__device__ inline int64_t warp_of_grid() { return (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) >> 5; }
__device__ inline int64_t warps_of_grid() { return (int64_t(gridDim.x) * blockDim.x) >> 5; }

// The least i in [0, limit) for which the predicate holds, else limit. It is asked for some beyond that one, too.
template <class Predicate>
__device__ int64_t warp_first(int64_t limit, Predicate holds) {
  for (int64_t begin = 0; begin < limit; begin += 32) {
    const int64_t i = begin + lane();
    const unsigned found = __ballot_sync(kWarp, i < limit && holds(i));
    if (found) return begin + __ffs(int(found)) - 1;
  }
  return limit;
}

// The same as frames_before, window_steps and sequence_rows, by a warp.
__device__ inline int64_t warp_frames_before(FlagRing flags, int64_t t, int64_t stack) {
  return warp_first(stack - 1, [&](int64_t n) { return t - n <= 0 || (flags[t - n] & kFirst); });
}
__device__ inline int64_t warp_window_steps(FlagRing flags, int64_t t, int64_t n, bool* terminated) {
  const int64_t j =
      warp_first(n, [&](int64_t i) { return !transition_exists(flags, t + i) || (flags[t + i] & kTerminated); });
  *terminated = j < n && transition_exists(flags, t + j);
  return *terminated ? j + 1 : j;
}
__device__ inline int64_t warp_sequence_rows(FlagRing flags, int64_t t, int64_t length, bool cross_episodes) {
  if (cross_episodes) return length;
  return 1 + warp_first(length - 1, [&](int64_t i) { return !transition_exists(flags, t + i); });
}

// The same as SumTree::descend down to a leaf, by a warp: a node's children are one load, their sums one scan.
__device__ inline int64_t warp_find(const SumTree& tree, uint64_t r) {
  int64_t node = 0;
  for (int level = tree.levels - 2; level >= 0; --level) {
    const uint64_t* child = tree.nodes + tree.offset[level] + (node << kTreeFanoutLog2);
    unsigned long long sum = lane() < (1 << kTreeFanoutLog2) ? child[lane()] : 0;
    for (int d = 1; d < 1 << kTreeFanoutLog2; d <<= 1) {
      const unsigned long long left = __shfl_up_sync(kWarp, sum, d);
      if (lane() >= d) sum += left;
    }
    const unsigned passed = __ballot_sync(kWarp, lane() < (1 << kTreeFanoutLog2) - 1 && sum <= r);
    const int j = __popc(passed);
    const unsigned long long before = __shfl_sync(kWarp, sum, j > 0 ? j - 1 : 0);
    if (j > 0) r -= before;
    node = (node << kTreeFanoutLog2) + j;
  }
  return node;
}

// Adds to a leaf and to every sum above it. Integers: the order of additions does not matter.
__device__ inline void tree_add(const SumTree& tree, int64_t i, uint64_t delta) {
  if (delta == 0) return;
  for (int level = 0; level < tree.levels; ++level, i >>= kTreeFanoutLog2)
    atomicAdd(reinterpret_cast<unsigned long long*>(tree.nodes + tree.offset[level] + i),
              static_cast<unsigned long long>(delta));
}

__device__ inline uint64_t leaf_of(const DeviceReplay& replay, double priority) {
  return tree_weight(pow(priority, replay.priority_exponent), replay.slots);
}

// Rounded twice, as on the CPU: nvcc would contract it.
__device__ inline double plus_product(double sum, double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dadd_rn(sum, __dmul_rn(a, b));
#else
  return sum + a * b;
#endif
}

// Copies
// ----------------------------------------------------------------------------------------------------------------

template <class T>
__device__ void warp_copy_as(char* to, const char* from, int64_t bytes) {
  T* out = reinterpret_cast<T*>(to);
  const T* in = reinterpret_cast<const T*>(from);
  const int64_t n = bytes / int64_t(sizeof(T));
  int64_t i = lane();
  for (; i + 96 < n; i += 128) {  // four loads on their way before the first store
    const T a = in[i], b = in[i + 32], c = in[i + 64], d = in[i + 96];
    out[i] = a, out[i + 32] = b, out[i + 64] = c, out[i + 96] = d;
  }
  for (; i < n; i += 32) out[i] = in[i];
}
template <class T>
__device__ void warp_zero_as(char* to, int64_t bytes) {
  for (int64_t i = lane(); i < bytes / int64_t(sizeof(T)); i += 32) reinterpret_cast<T*>(to)[i] = T{};
}
// `bytes` and both addresses are multiples of `width`: 16, 8, 4, 2 or 1. from null: zeros.
__device__ inline void warp_copy(char* to, const char* from, int64_t bytes, int width) {
  if (width == 16)
    from ? warp_copy_as<uint4>(to, from, bytes) : warp_zero_as<uint4>(to, bytes);
  else if (width == 8)
    from ? warp_copy_as<uint2>(to, from, bytes) : warp_zero_as<uint2>(to, bytes);
  else if (width == 4)
    from ? warp_copy_as<uint32_t>(to, from, bytes) : warp_zero_as<uint32_t>(to, bytes);
  else if (width == 2)
    from ? warp_copy_as<uint16_t>(to, from, bytes) : warp_zero_as<uint16_t>(to, bytes);
  else
    from ? warp_copy_as<uint8_t>(to, from, bytes) : warp_zero_as<uint8_t>(to, bytes);
}

// Appending
// -------------------------------------------------------------------------------------------------------------

struct AppendedRow {
  int64_t slot;
  int64_t head;    // of its stream after all rows of the call
  int32_t stream;  // negative unless it is its stream's newest
  int32_t entry;   // 1 + where the columns kept at starts take it; 0: they do not
  int32_t start;   // which of the call's entries that is
  uint8_t flags;
};

struct AppendColumn {
  const char* from;  // pinned memory of the host, or the device's
  char* to;
  int64_t step, bytes;  // between rows of `from`; of a row
  int64_t first, pieces;
  int32_t width;
  bool at_starts, packed;  // packed: `from` has the rows with an entry alone
};
struct AppendTable {
  int columns;
  bool rows_too;     // flags, heads and entries
  bool no_priority;  // none came with the rows
  int64_t units;     // warps for one row
  AppendColumn column[kMaxColumns];
};
static_assert(sizeof(AppendTable) + sizeof(DeviceReplay) < 4000, "arguments of a launch are limited to 4096 bytes");

__global__ void __launch_bounds__(kThreads)
    append_rows(const __grid_constant__ DeviceReplay replay, const __grid_constant__ AppendTable table,
                const AppendedRow* rows, int64_t count) {
  for (int64_t w = warp_of_grid(); w < count * table.units; w += warps_of_grid()) {
    const int64_t i = w / table.units, unit = w % table.units;
    const AppendedRow row = rows[i];
    if (table.rows_too && unit == table.units - 1) {
      if (lane() != 0) continue;
      replay.flags[row.slot] = row.flags;
      if (row.stream >= 0) replay.heads[row.stream] = row.head;
      if (replay.entries) replay.entries[row.slot] = row.entry;
      if (replay.given && table.no_priority) replay.given[row.slot] = nanf("");
      continue;
    }
    int c = 0;
    while (c + 1 < table.columns && unit >= table.column[c + 1].first) ++c;
    const AppendColumn& column = table.column[c];
    if (column.at_starts && row.entry == 0) continue;
    const int64_t begin = (unit - column.first) * kPiece;
    const int64_t bytes = column.bytes - begin < kPiece ? column.bytes - begin : kPiece;
    const int64_t to = column.at_starts ? row.entry - 1 : row.slot;
    const int64_t from = column.packed ? row.start : i;
    warp_copy(column.to + to * column.bytes + begin, column.from + from * column.step + begin, bytes, column.width);
  }
}

// changes: slot * 2 + (1: an item is complete, 0: it lost a row); no slot twice.
__global__ void __launch_bounds__(kThreads)
    change_leaves(const __grid_constant__ DeviceReplay replay, const int64_t* changes, int64_t count) {
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
    const int64_t slot = changes[i] >> 1;
    tree_add(replay.tree, slot, uint64_t(changes[i] & 1) - replay.tree.leaf(slot));
  }
}

// The same with priorities, in one block: an item without one of its own gets the highest seen before it in the list.
__global__ void __launch_bounds__(kChangeThreads)
    change_leaves_by_priority(const __grid_constant__ DeviceReplay replay, const int64_t* changes, int64_t count) {
  __shared__ double of_warp[kChangeThreads / 32];
  double highest = __longlong_as_double((long long)(replay.counters->max_priority));
  for (int64_t begin = 0; begin < count; begin += kChangeThreads) {
    const int64_t i = begin + threadIdx.x;
    const int64_t change = i < count ? changes[i] : 0;
    const int64_t slot = change >> 1;
    const bool ready = i < count && (change & 1);
    const double own = ready ? double(replay.given[slot]) : -1;
    const bool has_own = own >= 0 && own <= 1.7976931348623157e308;  // an array on the device is not checked before
    double most = has_own ? own : -1;                                // of the list up to here
    for (int d = 1; d < 32; d <<= 1) {
      const double left = __shfl_up_sync(kWarp, most, d);
      if (lane() >= d && left > most) most = left;
    }
    if (lane() == 31) of_warp[threadIdx.x >> 5] = most;
    __syncthreads();
    double before = highest;
    for (int w = 0; w < kChangeThreads / 32; ++w) {
      if (w < int(threadIdx.x >> 5) && of_warp[w] > before) before = of_warp[w];
      if (of_warp[w] > highest) highest = of_warp[w];
    }
    __syncthreads();  // of_warp is written again
    if (i >= count) continue;
    const uint64_t leaf = ready ? leaf_of(replay, has_own ? own : before > most ? before : most) : 0;
    tree_add(replay.tree, slot, leaf - replay.tree.leaf(slot));
  }
  if (threadIdx.x == 0) replay.counters->max_priority = (unsigned long long)(__double_as_longlong(highest));
}

// Sampling
// --------------------------------------------------------------------------------------------------------------

struct DrawnItem {
  int64_t stream, t;
  int64_t rows;        // of the sequence; steps of the n-step window
  int32_t before;      // frames of the stack before t that its episode has
  int32_t before_end;  // the same for the row `rows` steps later (n-step)
  int32_t entry;       // in the columns kept at starts
  int32_t terminated;
};

__global__ void __launch_bounds__(kThreads)
    draw_items(const __grid_constant__ DeviceReplay replay, Philox rng, int64_t batch, double items,
               double importance_exponent, int turn, DrawnItem* drawn, int64_t* indices, float* probability,
               float* weight) {
  const ReplayShape& shape = replay.shape;
  if (blockIdx.x == 0 && threadIdx.x == 0) replay.counters->highest[1 - turn] = 0;  // for the next draw
  const uint64_t total = replay.tree.total();
  for (int64_t i = warp_of_grid(); i < batch; i += warps_of_grid()) {
    const int64_t slot = warp_find(replay.tree, tree_draw(rng, uint64_t(i), total));
    DrawnItem item{};
    item.stream = slot / shape.ring;
    item.t = row_at(replay.heads[item.stream], slot % shape.ring, shape.ring);
    const FlagRing flags = replay.flags_of(item.stream);
    item.before = int32_t(warp_frames_before(flags, item.t, shape.stack));
    if (shape.n_step) {
      bool terminated;
      item.rows = warp_window_steps(flags, item.t, shape.n_step, &terminated);
      item.terminated = terminated;
      item.before_end = int32_t(warp_frames_before(flags, item.t + item.rows, shape.stack));
    } else {
      item.rows = warp_sequence_rows(flags, item.t, shape.length, shape.cross_episodes);
    }
    if (lane() != 0) continue;
    if (replay.entries) item.entry = replay.entries[slot] - 1;
    drawn[i] = item;
    const double p = double(replay.tree.leaf(slot)) / double(total);
    const float w = importance_exponent == 0 ? 1.f : float(pow(items * p, -importance_exponent));
    indices[i] = item.t * shape.streams + item.stream;
    probability[i] = float(p);
    weight[i] = w;
    atomicMax(&replay.counters->highest[turn], __float_as_uint(w));
  }
}

struct GatherColumn {
  const char* from;
  char* to;
  char* next;             // n-step: the observation at the window's end; null: none
  int64_t bytes;          // of a row
  int64_t first, pieces;  // units of an item before this column's; pieces of a row
  int32_t width, frames;  // frames: rows of an item in `to`
  bool stacked, at_starts;
};
struct GatherTable {
  int columns;
  bool scalars_too;
  int turn;
  int64_t units;  // warps for one item
  float *reward, *discount, *weight;
  int64_t* steps;
  bool *terminated, *is_first, *is_last, *mask;
  GatherColumn column[kMaxColumns];
};
static_assert(sizeof(GatherTable) + sizeof(DeviceReplay) < 4000, "arguments of a launch are limited to 4096 bytes");

__device__ inline void gather_window_scalars(const DeviceReplay& replay, const GatherTable& table,
                                             const DrawnItem& item, int64_t i) {
  double sum = 0, discount = 1;
  for (int64_t begin = 0; begin < item.rows; begin += 32) {
    const int64_t j = begin + lane();
    const float own = j < item.rows ? replay.reward[replay.slot(item.stream, item.t + j)] : 0.f;
    const int n = int(item.rows - begin < 32 ? item.rows - begin : 32);
    for (int k = 0; k < n; ++k) {
      sum = plus_product(sum, discount, double(__shfl_sync(kWarp, own, k)));
      discount *= replay.gamma;
    }
  }
  if (lane() != 0) return;
  table.reward[i] = float(sum);
  table.discount[i] = item.terminated ? 0.f : float(discount);
  table.steps[i] = item.rows;
}

__device__ inline void gather_sequence_scalars(const DeviceReplay& replay, const GatherTable& table,
                                               const DrawnItem& item, int64_t i) {
  const int64_t length = replay.shape.length;
  const FlagRing flags = replay.flags_of(item.stream);
  for (int64_t j = lane(); j < length; j += 32) {
    const bool real = j < item.rows;
    const uint8_t f = real ? flags[item.t + j] : uint8_t(0);
    table.reward[i * length + j] = real ? replay.reward[replay.slot(item.stream, item.t + j)] : 0.f;
    table.terminated[i * length + j] = (f & kTerminated) != 0;
    table.is_first[i * length + j] = (f & kFirst) != 0;
    table.is_last[i * length + j] = (f & kLast) != 0;
    if (j > 0) table.mask[i * (length - 1) + j - 1] = real && transition_exists(flags, item.t + j - 1);
  }
}

__global__ void __launch_bounds__(kThreads)
    gather_items(const __grid_constant__ DeviceReplay replay, const __grid_constant__ GatherTable table,
                 const DrawnItem* drawn, int64_t batch) {
  const ReplayShape& shape = replay.shape;
  for (int64_t w = warp_of_grid(); w < batch * table.units; w += warps_of_grid()) {
    const int64_t i = w / table.units, unit = w % table.units;
    const DrawnItem item = drawn[i];
    if (table.scalars_too && unit == table.units - 1) {
      if (shape.n_step)
        gather_window_scalars(replay, table, item, i);
      else
        gather_sequence_scalars(replay, table, item, i);
      if (lane() == 0) table.weight[i] /= __uint_as_float(replay.counters->highest[table.turn]);
      continue;
    }
    int c = 0;
    while (c + 1 < table.columns && unit >= table.column[c + 1].first) ++c;
    const GatherColumn& column = table.column[c];
    const int64_t piece = (unit - column.first) % column.pieces;
    int64_t frame = (unit - column.first) / column.pieces;
    char* to = column.to;
    int64_t newest = item.t, before = column.stacked ? item.before : 0;  // of an n-step item
    if (frame >= column.frames) {
      frame -= column.frames, to = column.next;
      newest += item.rows, before = column.stacked ? item.before_end : 0;
    }
    int64_t slot = 0;
    bool real = true;
    if (column.at_starts) {
      slot = item.entry;
    } else if (shape.n_step) {
      const int64_t back = column.frames - 1 - frame;
      real = back <= before;
      if (real) slot = replay.slot(item.stream, newest - back);
    } else {
      const int64_t t = item.t + frame - (column.stacked ? shape.stack - 1 : 0);
      real = t >= item.t - before && t < item.t + item.rows;
      if (real) slot = replay.slot(item.stream, t);
    }
    const int64_t begin = piece * kPiece;
    const int64_t bytes = column.bytes - begin < kPiece ? column.bytes - begin : kPiece;
    warp_copy(to + (i * column.frames + frame) * column.bytes + begin,
              real ? column.from + slot * column.bytes + begin : nullptr, bytes, column.width);
  }
}

// Priorities
// ------------------------------------------------------------------------------------------------------------

// Arrays whose rows are contiguous each, `step` bytes apart.
template <class T>
struct Rows {
  const void* data;
  int64_t step;
  __device__ const T* operator[](int64_t i) const {
    return reinterpret_cast<const T*>(static_cast<const char*>(data) + i * step);
  }
};

// priority[i] from the errors of item i; negative where nothing is to be set. Of repeated indices the last one claims
// the slot. Stale indices, those never handed out and errors that are not finite are counted. Errors are added up in
// double, in another order than on the CPU: where that rounds at all, a priority's last bit may differ.
__global__ void __launch_bounds__(kThreads)
    claim_updates(const __grid_constant__ DeviceReplay replay, int64_t batch, int64_t steps, Rows<int64_t> indices,
                  Rows<float> td, Rows<bool> mask, double* priority) {
  const ReplayShape& shape = replay.shape;
  for (int64_t i = warp_of_grid(); i < batch; i += warps_of_grid()) {
    const int64_t index = *indices[i];
    const int64_t s = index >= 0 ? index % shape.streams : 0, t = index >= 0 ? index / shape.streams : -1;
    if (t < 0 || !replay.holds(s, t)) {
      if (lane() == 0) {
        atomicAdd(&replay.counters->stale, 1ull);
        priority[i] = -1;
      }
      continue;
    }
    const FlagRing flags = replay.flags_of(s);
    const float* errors = td[i];
    float most = 0;
    double sum = 0;
    int64_t n = 0;
    if (!mask.data && !shape.cross_episodes) {  // those up to the episode's end, in eight sums
      const int64_t rows = shape.n_step ? 2 : warp_sequence_rows(flags, t, shape.length, false);
      n = rows - 1 - shape.burn_in < steps ? rows - 1 - shape.burn_in : steps;
      double own_sum = 0;
      float own_most = 0;
      for (int64_t j = lane(); lane() < 8 && j < n; j += 8) {
        const float d = fabsf(errors[j]);
        own_sum += double(d), own_most = own_most > d ? own_most : d;
      }
      for (int k = 0; k < 8; ++k) {
        sum += __shfl_sync(kWarp, own_sum, k);
        const float m = __shfl_sync(kWarp, own_most, k);
        most = most > m ? most : m;
      }
    } else {
      for (int64_t begin = 0; begin < steps; begin += 32) {
        const int64_t j = begin + lane();
        const bool real = j < steps && (mask.data ? mask[i][j] : transition_exists(flags, t + shape.burn_in + j));
        const float own = real ? fabsf(errors[j]) : 0.f;
        unsigned left = __ballot_sync(kWarp, real);
        n += __popc(left);
        for (; left; left &= left - 1) {
          const float d = __shfl_sync(kWarp, own, __ffs(int(left)) - 1);
          sum += double(d), most = most > d ? most : d;
        }
      }
    }
    if (lane() != 0) continue;
    const bool finite = sum <= 1.7976931348623157e308;
    if (!finite) atomicAdd(&replay.counters->stale, 1ull);
    const double p =
        shape.n_step ? double(most) : plus_product((1 - replay.eta) * sum / double(n), replay.eta, double(most));
    const bool sets = finite && n > 0 && replay.given;
    priority[i] = sets ? p : -1;
    if (!sets) continue;
    atomicMax(&replay.claims[replay.slot(s, t)], uint32_t(i) + 1);
    atomicMax(&replay.counters->max_priority, (unsigned long long)(__double_as_longlong(p)));
  }
}

__global__ void __launch_bounds__(kThreads) apply_updates(const __grid_constant__ DeviceReplay replay, int64_t batch,
                                                          Rows<int64_t> indices, const double* priority) {
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < batch; i += stride) {
    if (!(priority[i] >= 0)) continue;
    const int64_t index = *indices[i], slot = replay.slot(index % replay.shape.streams, index / replay.shape.streams);
    if (replay.claims[slot] != uint32_t(i) + 1) continue;
    replay.claims[slot] = 0;  // the next update finds none; whoever lost it reads this or the winner's
    tree_add(replay.tree, slot, leaf_of(replay, priority[i]) - replay.tree.leaf(slot));
  }
}

}  // namespace
}  // namespace urlfast
