// What memory there is, asked before much of it is taken: Linux promises more than it has, and ends who believes it.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

namespace urlfast {

// Python sees MemoryError.
struct MemoryShortage : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Bytes that may still be used: the machine's MemAvailable, or what the process's cgroup has left, if that is less. -1
// where the system does not say.
int64_t available_memory();

// Throws MemoryShortage, naming the argument that asks for them, unless so many bytes are available. A double: products
// of what callers ask for leave int64.
void require_room(const char* argument, const std::string& what, double bytes);

// Zeroed memory that is taken from the system as it is touched, in huge pages where the system has them: reading much
// of it would wait for the addresses of small ones. Null where the system refuses, as it does what is more than the
// machine has, unless `sparse` says that it will not all be touched.
void* map_pages(int64_t bytes, bool sparse);
void unmap_pages(void* pages, int64_t bytes);

std::string gigabytes(double bytes);  // "7.06 GB"

}  // namespace urlfast
