// The control groups that limit this process.
#pragma once
#include <string>
#include <vector>

namespace urlfast {

// A group's folder, ending in "/"; in the unified hierarchy (version 2) or in one controller's own.
struct Cgroup {
  std::string folder;
  bool unified;
};

// The process's group and all above it up to the root, in each hierarchy that may limit what `controller` ("cpu",
// "memory") counts. Folders may not exist: within a container only the root may be seen.
std::vector<Cgroup> cgroups(const std::string& controller);

// The number that a file begins with; -1 where there is no such file, or it says "max".
double cgroup_number(const std::string& file);

}  // namespace urlfast
