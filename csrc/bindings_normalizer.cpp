#include "bindings_dlpack.hpp"

namespace urlfast {
void bind_normalizer(py::module_&) {}
}  // namespace urlfast
