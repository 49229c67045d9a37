#include "common/memory.hpp"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>

#include "common/check.hpp"

namespace urlfast {
namespace {

// The limit of a cgroup minus what it uses, following the group up to its root; -1 where nothing limits it.
int64_t cgroup_room() {
  int64_t room = -1;
  auto number = [](const std::string& path) -> int64_t {
    std::ifstream in(path);
    std::string word;
    if (!(in >> word) || word == "max") return -1;
    return std::strtoll(word.c_str(), nullptr, 10);
  };
  auto consider = [&](const std::string& folder, const char* limit_name, const char* used_name) {
    const int64_t limit = number(folder + limit_name), used = number(folder + used_name);
    if (limit <= 0 || limit > int64_t(1) << 60 || used < 0) return;  // v1 writes a huge number for "no limit"
    const int64_t left = std::max<int64_t>(0, limit - used);
    room = room < 0 ? left : std::min(room, left);
  };
  std::ifstream groups("/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    const bool v2 = line.rfind("0::", 0) == 0;
    const size_t memory = line.find(":memory:");
    if (!v2 && memory == std::string::npos) continue;
    std::string path = v2 ? line.substr(3) : line.substr(memory + 8);
    const std::string root = v2 ? "/sys/fs/cgroup" : "/sys/fs/cgroup/memory";
    for (;;) {
      const std::string folder = root + (path == "/" ? "" : path) + "/";
      v2 ? consider(folder, "memory.max", "memory.current")
         : consider(folder, "memory.limit_in_bytes", "memory.usage_in_bytes");
      if (path.empty() || path == "/") break;
      path.resize(path.rfind('/') == std::string::npos ? 0 : path.rfind('/'));
    }
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

}  // namespace urlfast
