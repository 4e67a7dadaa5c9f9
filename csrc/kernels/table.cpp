// The table of one instruction set.
#include "list.h"
#include "simd.h"

namespace vot {
namespace VOT_ISA {

#define VOT_DECLARE(function, Problem) void function(const Problem&, const Parallel&);
VOT_KERNELS(VOT_DECLARE)

extern const Kernels kernels;
const Kernels kernels = {
#define VOT_ENTRY(function, Problem) function,
    VOT_KERNELS(VOT_ENTRY)};

}  // namespace VOT_ISA
}  // namespace vot
