#include "pack_patches.h"

#include "rows.h"
#include "scratch.h"

namespace vot {
namespace VOT_ISA {
namespace {

constexpr int64_t TOGETHER = 16;  // patches that are cut at a time: then rows of the image are read in longer runs

// As std::memcpy, without its call: runs are short. The last step overlaps the one before.
template <int64_t STEP = VOT_VECTOR_BYTES>
VOT_INLINE void copy_run(char* to, const char* from, int64_t bytes) {
  if (bytes < STEP) {
    if constexpr (STEP > 1) copy_run<STEP / 2>(to, from, bytes);
    return;
  }
  for (int64_t i = 0; i + STEP <= bytes; i += STEP) std::memcpy(to + i, from + i, STEP);
  std::memcpy(to + bytes - STEP, from + bytes - STEP, STEP);
}

// Copies past the cache: whole lines of it, but for the two ends.
void stream_run(char* to, const char* from, int64_t bytes) {
  const int64_t head = least<int64_t>(bytes, -reinterpret_cast<intptr_t>(to) & (VOT_VECTOR_BYTES - 1));
  std::memcpy(to, from, size_t(head));
  int64_t i = head;
  for (; i + VOT_VECTOR_BYTES <= bytes; i += VOT_VECTOR_BYTES)
    stream(reinterpret_cast<float*>(to + i), load(reinterpret_cast<const float*>(from + i)));
  std::memcpy(to + i, from + i, size_t(bytes - i));
}

// A row of patches: patches of a clip that lie side by side, and so do their numbers.
struct Strip {
  const Clip* clip;
  int64_t t, y;           // of its patches
  int64_t first, length;  // its first patch, of all; how many it has
};

// Which strips and patches belong to which clip: two numbers per clip, and one more pair for the end.
struct Table {
  int64_t *first_strip, *first_patch;
};

Table table_of(const PackPatches& problem, int64_t* space) {
  const Table table = {space, space + problem.clips + 1};
  table.first_strip[0] = table.first_patch[0] = 0;
  for (int64_t i = 0; i < problem.clips; i++) {
    const Clip& clip = problem.clip[i];
    const int64_t strips = clip.frames / problem.temporal_patch_size * (clip.height / problem.patch_size);
    table.first_strip[i + 1] = table.first_strip[i] + strips;
    table.first_patch[i + 1] = table.first_patch[i] + strips * (clip.width / problem.patch_size);
  }
  return table;
}

Strip strip_at(const PackPatches& problem, const Table& table, int64_t index) {
  const int64_t i = last_at_or_below(table.first_strip, problem.clips + 1, index);
  const Clip& clip = problem.clip[i];
  const int64_t rows = clip.height / problem.patch_size, length = clip.width / problem.patch_size;
  const int64_t within = index - table.first_strip[i];
  return {&clip, within / rows, within % rows, table.first_patch[i] + within * length, length};
}

int64_t patch_numbers(const PackPatches& problem) {
  return problem.channels * problem.temporal_patch_size * problem.patch_size * problem.patch_size;
}

int64_t total_bytes(const PackPatches& problem) {
  int64_t pixels = 0;
  for (int64_t i = 0; i < problem.clips; i++)
    pixels += problem.clip[i].frames * problem.clip[i].height * problem.clip[i].width;
  return pixels * problem.channels * problem.item_bytes;
}

// body(within, row) for each row of pixels that a strip has, channel by channel and frame by frame: its first number
// within the patch, and in the clip.
template <class Body>
VOT_INLINE void for_rows(const PackPatches& problem, const Strip& strip, const Body& body) {
  // In variables of their own, because what `body` writes might be anything else.
  const int64_t channels = problem.channels, frames = problem.temporal_patch_size, rows = problem.patch_size;
  const Clip clip = *strip.clip;
  const int64_t first = strip.t * frames * clip.frame_stride + strip.y * rows * clip.row_stride;
  int64_t within = 0;
  for (int64_t c = 0; c < channels; c++)
    for (int64_t f = 0; f < frames; f++) {
      int64_t row = first + c * clip.channel_stride + f * clip.frame_stride;
      for (int64_t r = 0; r < rows; r++, within += rows, row += clip.row_stride) body(within, row);
    }
}

// Patches from x to before `end` of a strip, one after the other in `to`.
template <class Item>
void cut(const PackPatches& problem, const Strip& strip, int64_t x, int64_t end, Item* to) {
  const int64_t p = problem.patch_size, numbers = patch_numbers(problem), step = strip.clip->column_stride;
  const Item* clip = static_cast<const Item*>(strip.clip->data);
  for_rows(problem, strip, [&](int64_t within, int64_t row) {
    for (int64_t i = x; i < end; i++) {
      Item* patch = to + (i - x) * numbers + within;
      const Item* pixels = clip + row + i * p * step;
      if (step == 1)
        copy_run(reinterpret_cast<char*>(patch), reinterpret_cast<const char*>(pixels), p * int64_t(sizeof(Item)));
      else
        for (int64_t j = 0; j < p; j++) patch[j] = pixels[j * step];
    }
  });
}

// The same for runs that are whole lines of the cache: nothing has to be put together. Patches are written one after the
// other, because memory takes lines faster in their order than it gives them.
template <class Item>
void cut_lines(const PackPatches& problem, const Strip& strip, char* to) {
  const int64_t run = problem.patch_size * int64_t(sizeof(Item)), bytes = patch_numbers(problem) * int64_t(sizeof(Item));
  for (int64_t i = 0; i < strip.length; i++) {
    const char* clip = static_cast<const char*>(strip.clip->data) + i * run;
    char* patch = to + i * bytes;
    for_rows(problem, strip, [=](int64_t within, int64_t row) {
      for (int64_t j = 0; j < run; j += VOT_VECTOR_BYTES)
        stream(reinterpret_cast<float*>(patch + within * int64_t(sizeof(Item)) + j),
               load(reinterpret_cast<const float*>(clip + row * int64_t(sizeof(Item)) + j)));
    });
  }
}

template <class Item>
void cut_strip(const PackPatches& problem, const Strip& strip, bool past_cache) {
  constexpr int64_t item = sizeof(Item), LINE = 64;
  const int64_t bytes = patch_numbers(problem) * item;
  char* patches = static_cast<char*>(problem.patches) + strip.first * bytes;
  if (!past_cache) return cut(problem, strip, 0, strip.length, reinterpret_cast<Item*>(patches));
  if (problem.patch_size * item % LINE == 0 && strip.clip->column_stride == 1)
    return cut_lines<Item>(problem, strip, patches);
  Item* some = reinterpret_cast<Item*>(scratch<1>(size_t(TOGETHER * bytes + 3) / 4));
  for (int64_t x = 0; x < strip.length; x += TOGETHER) {
    const int64_t end = least(x + TOGETHER, strip.length);
    cut(problem, strip, x, end, some);
    stream_run(patches + x * bytes, reinterpret_cast<const char*>(some), (end - x) * bytes);
  }
}

template <class Item>
void join_strip(const PackPatches& problem, const Strip& strip, bool past_cache) {
  const int64_t p = problem.patch_size, numbers = patch_numbers(problem), run = p * int64_t(sizeof(Item));
  const Item* patches = static_cast<const Item*>(problem.patches) + strip.first * numbers;
  Item* clip = static_cast<Item*>(strip.clip->data);
  char* line = reinterpret_cast<char*>(scratch<1>(size_t(strip.length * run + 3) / 4));
  for_rows(problem, strip, [&](int64_t within, int64_t row) {
    char* pixels = past_cache ? line : reinterpret_cast<char*>(clip + row);
    for (int64_t i = 0; i < strip.length; i++)
      copy_run(pixels + i * run, reinterpret_cast<const char*>(patches + i * numbers + within), run);
    if (past_cache) stream_run(reinterpret_cast<char*>(clip + row), line, strip.length * run);
  });
}

template <class Body>
void with_item(int64_t bytes, const Body& body) {
  switch (bytes) {
    case 1: return body(uint8_t{});
    case 2: return body(uint16_t{});
    case 4: return body(uint32_t{});
    case 8: return body(uint64_t{});
  }
}

// body(Item{}, strip) for every strip.
template <class Body>
void for_strips(const PackPatches& problem, const Parallel& parallel, const Body& body) {
  const Table table = table_of(problem, reinterpret_cast<int64_t*>(scratch<0>(size_t(4 * (problem.clips + 1)))));
  with_item(problem.item_bytes, [&](auto item) {
    parallel(table.first_strip[problem.clips], [&](int64_t index) {
      body(item, strip_at(problem, table, index));
      finish_streams();
    });
  });
}

}  // namespace

void pack_patches_forward(const PackPatches& problem, const Parallel& parallel) {
  const bool past_cache = passes_cache(1, total_bytes(problem));
  for_strips(problem, parallel, [&](auto item, const Strip& strip) {
    cut_strip<decltype(item)>(problem, strip, past_cache);
  });
}

void pack_patches_backward(const PackPatches& problem, const Parallel& parallel) {
  const bool past_cache = passes_cache(problem.clips, total_bytes(problem) / problem.clips);
  for_strips(problem, parallel, [&](auto item, const Strip& strip) {
    join_strip<decltype(item)>(problem, strip, past_cache);
  });
}

}  // namespace VOT_ISA
}  // namespace vot
