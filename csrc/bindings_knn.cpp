#include "bindings_dlpack.hpp"

namespace urlfast {
void bind_knn(py::module_&) {}
}  // namespace urlfast
