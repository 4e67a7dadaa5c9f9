// driver SEEDS: every registered check with each of so many seeds, on three threads.
#include "driver.h"

#include <atomic>
#include <thread>

#include "../../csrc/kernels/tiles.h"

namespace vot {
namespace VOT_ISA {
namespace {

constexpr int THREADS = 3;

void for_all(int64_t tasks, Parallel::Task run, const void* context) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t task = next++; task < tasks; task = next++) run(context, task);
  };
  std::vector<std::thread> others;
  for (int i = 1; i < THREADS; i++) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
}

struct Entry {
  std::string name;
  Registered::Check check;
};
std::vector<Entry>& entries() {
  static std::vector<Entry> list;
  return list;
}

}  // namespace

Registered::Registered(const char* name, Check check) { entries().push_back({name, check}); }

int check_all(int seeds) {
  for (const Entry& entry : entries()) {
    for (int seed = 0; seed < seeds; seed++) {
      Random random(seed);
      entry.check(random, {for_all, THREADS});
    }
    std::printf("%s\n", entry.name.c_str());
  }
  return 0;
}

}  // namespace VOT_ISA
}  // namespace vot

int main(int, char** arguments) {
#ifdef __AMX_BF16__
  if (!vot::may_use_tiles()) return 2;
#endif
  return vot::VOT_ISA::check_all(std::atoi(arguments[1]));
}
