// The pages of large results.
#include <sys/mman.h>

#include "binding.h"

namespace vot {
namespace {

// From this size on, a result holds whole large pages. Its memory may be new to the process, always so from 32 MiB on, and
// smaller ones after malloc has given memory back. The system clears it at the first touch of each page: with pages of
// 4 KiB that takes many times as long as a memory-bound kernel, with pages of 2 MiB half as long.
constexpr int64_t WORTH_IT_FROM = int64_t(1) << 22, LARGE_PAGE = int64_t(1) << 21;

}  // namespace

void prefer_large_pages(void* data, int64_t bytes) {
  if (bytes < WORTH_IT_FROM) return;
  const uintptr_t mask = uintptr_t(LARGE_PAGE - 1), begin = (reinterpret_cast<uintptr_t>(data) + mask) & ~mask;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) & ~mask;
  // It is a hint: a system without large pages refuses it, and nothing else changes.
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

}  // namespace vot
