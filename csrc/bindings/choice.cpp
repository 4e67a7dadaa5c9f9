#include "choice.h"

#include <cstdlib>
#include <cstring>

#include "../kernels/tiles.h"

// The build defines VOT_ISAS(X) as X(isa) for each instruction set that was compiled, the best one first.
namespace vot {

#define VOT_DECLARE(isa)           \
  namespace isa {                  \
  extern const Kernels kernels;    \
  }
VOT_ISAS(VOT_DECLARE)
#undef VOT_DECLARE

namespace {

bool runs(const char* isa) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2");
  if (!std::strcmp(isa, "avx2")) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (!std::strcmp(isa, "avx512")) return avx512;
  if (!std::strcmp(isa, "avx512_bf16")) return avx512 && __builtin_cpu_supports("avx512bf16");
  if (!std::strcmp(isa, "amx")) return avx512 && may_use_tiles();
#endif
  return !std::strcmp(isa, "generic");
}

Choice choose() {
  const char* wanted = std::getenv("VOT_CPU_ISA");
  const auto fits = [&](const char* isa) {
    return runs(isa) && (!wanted || !*wanted || !std::strcmp(isa, wanted));
  };
#define VOT_TRY(isa) \
  if (fits(#isa)) return {#isa, &isa::kernels};
  VOT_ISAS(VOT_TRY)
#undef VOT_TRY
  return {"", nullptr};
}

}  // namespace

const Choice& choice() {
  static const Choice made = choose();
  return made;
}

}  // namespace vot
