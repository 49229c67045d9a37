#include "bindings_dlpack.hpp"

namespace urlfast {
void bind_latent(py::module_&) {}
}  // namespace urlfast
