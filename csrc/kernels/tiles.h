// Leave to use AMX tiles of bf16. It is Linux that lends their registers, to processes that ask.
#pragma once
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace vot {

inline bool may_use_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  unsigned a, b, c, features, halves, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &features) || !__get_cpuid_count(7, 1, &halves, &b, &c, &d)) return false;
  const bool has_tiles = features >> 22 & 1 && features >> 24 & 1, has_halves = halves >> 5 & 1;
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM of the kernel's asm/prctl.h
  return has_tiles && has_halves && !syscall(SYS_arch_prctl, REQUEST, TILE_DATA);
#else
  return false;
#endif
}

}  // namespace vot
