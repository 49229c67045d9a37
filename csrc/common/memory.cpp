#include "common/memory.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>

#include "common/cgroup.hpp"
#include "common/check.hpp"

namespace urlfast {
namespace {

// Bytes of cached files: counted as used, and given back before anything else is refused.
double cached_files(const Cgroup& group) {
  std::ifstream in(group.folder + "memory.stat");
  const std::string prefix = group.unified ? "" : "total_";
  double sum = 0, bytes = 0;
  for (std::string name; in >> name >> bytes;)
    if (name == prefix + "inactive_file" || name == prefix + "active_file") sum += bytes;
  return sum;
}

// What the process's cgroups leave: the limit of each minus what it uses; -1 where nothing limits it.
int64_t cgroup_room() {
  int64_t room = -1;
  for (const Cgroup& group : cgroups("memory")) {
    const double limit = cgroup_number(group.folder + (group.unified ? "memory.max" : "memory.limit_in_bytes"));
    const double used = cgroup_number(group.folder + (group.unified ? "memory.current" : "memory.usage_in_bytes"));
    if (limit <= 0 || limit > 0x1p60 || used < 0) continue;  // version 1 writes a huge number for "no limit"
    const auto left = int64_t(std::clamp(limit - used + cached_files(group), 0., limit));
    room = room < 0 ? left : std::min(room, left);
  }
  return room;
}

}  // namespace

std::string gigabytes(double bytes) {
  char out[32];
  std::snprintf(out, sizeof out, "%.2f GB", bytes * 1e-9);
  return out;
}

int64_t available_memory() {
  int64_t available = -1;
  std::ifstream info("/proc/meminfo");
  std::string name;
  int64_t kilobytes = 0;
  for (std::string line; std::getline(info, line);)
    if (line.rfind("MemAvailable:", 0) == 0) {
      kilobytes = std::strtoll(line.c_str() + 13, nullptr, 10);
      available = kilobytes * 1024;
      break;
    }
  const int64_t room = cgroup_room();
  if (room >= 0 && (available < 0 || room < available)) available = room;
  return available;
}

void require_room(const char* argument, const std::string& what, double bytes) {
  constexpr double kSmall = 1 << 28;  // below it, a look at the machine is not worth its 50 us
  if (bytes < kSmall) return;
  const int64_t available = available_memory();
  if (bytes <= (available < 0 ? 0x1p46 : double(available))) return;
  throw MemoryShortage(
      text(argument, ": ", what, " take ", gigabytes(bytes), ", but ",
           available < 0 ? "no machine has that" : gigabytes(double(available)) + " of memory are available"));
}

void* map_pages(int64_t bytes, bool sparse) {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | (sparse ? MAP_NORESERVE : 0);
  void* pages = mmap(nullptr, size_t(bytes), PROT_READ | PROT_WRITE, flags, -1, 0);
  if (pages == MAP_FAILED) return nullptr;
#ifdef MADV_HUGEPAGE
  if (bytes >= int64_t(2) << 20) madvise(pages, size_t(bytes), MADV_HUGEPAGE);  // advice: it may be declined
#endif
  return pages;
}

void unmap_pages(void* pages, int64_t bytes) { munmap(pages, size_t(bytes)); }

}  // namespace urlfast
