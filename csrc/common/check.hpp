// Errors that name the argument, what came and what is accepted. They reach Python as ValueError.
#pragma once
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

namespace urlfast {

template <class... Parts>
std::string text(Parts&&... parts) {
  std::ostringstream out;
  (out << ... << std::forward<Parts>(parts));
  return out.str();
}

// require(k <= m, "k", "must lie in 1..", m, ", got ", k)  ->  ValueError: k: must lie in 1..4, got 5
template <class... Parts>
void require(bool ok, const char* argument, Parts&&... parts) {
  if (!ok) throw std::invalid_argument(text(argument, ": ", std::forward<Parts>(parts)...));
}

}  // namespace urlfast
