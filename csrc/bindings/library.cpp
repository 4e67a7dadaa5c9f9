// What the library says of itself.
#include "binding.h"

namespace vot {
namespace {

std::string isa() { return choice().isa; }

}  // namespace
}  // namespace vot

STABLE_TORCH_LIBRARY_FRAGMENT(vot_kernels_cpp, library) { library.def("isa() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(vot_kernels_cpp, CompositeExplicitAutograd, library) {
  library.impl("isa", TORCH_BOX(&vot::isa));
}
