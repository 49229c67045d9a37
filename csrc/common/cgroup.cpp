#include "common/cgroup.hpp"

#include <cstdlib>
#include <fstream>

namespace urlfast {

std::vector<Cgroup> cgroups(const std::string& controller) {
  std::vector<Cgroup> out;
  std::ifstream lines("/proc/self/cgroup");  // "0::/path", or of version 1 "4:cpu,cpuacct:/path"
  for (std::string line; std::getline(lines, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const bool unified = controllers.empty();
    if (!unified && ("," + controllers + ",").find("," + controller + ",") == std::string::npos) continue;
    const std::string root = unified ? "/sys/fs/cgroup" : "/sys/fs/cgroup/" + controller;
    for (std::string path = line.substr(second + 1);;) {
      out.push_back({root + (path == "/" ? "" : path) + "/", unified});
      if (path.empty() || path == "/") break;
      path.resize(path.rfind('/') == std::string::npos ? 0 : path.rfind('/'));
    }
  }
  return out;
}

double cgroup_number(const std::string& file) {
  std::ifstream in(file);
  std::string word;
  if (!(in >> word) || word == "max") return -1;
  return std::strtod(word.c_str(), nullptr);
}

}  // namespace urlfast
