// The pages of large results.
#include <sys/mman.h>

#include "binding.h"

namespace vot {
namespace {

// From this size on, malloc asks the system for memory each time. The system clears it at the first touch of each page:
// with pages of 4 KiB that takes longer than a memory-bound kernel, with pages of 2 MiB less than half as long.
constexpr int64_t NEW_FROM = int64_t(1) << 25, LARGE_PAGE = int64_t(1) << 21;

}  // namespace

void prefer_large_pages(void* data, int64_t bytes) {
  if (bytes < NEW_FROM) return;
  const uintptr_t mask = uintptr_t(LARGE_PAGE - 1), begin = (reinterpret_cast<uintptr_t>(data) + mask) & ~mask;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) & ~mask;
  // It is a hint: a system without large pages refuses it, and nothing else changes.
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

}  // namespace vot
