#include "bindings_dlpack.hpp"

namespace urlfast {
void bind_replay(py::module_&) {}
}  // namespace urlfast
