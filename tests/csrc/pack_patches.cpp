#include "driver.h"

namespace vot {
namespace VOT_ISA {
namespace {

// As torch allocates results: large ones are written in whole vectors.
struct alignas(64) Line {
  char bytes[64];
};

template <class Item>
void check(Random& random, const Parallel& parallel) {
  const int64_t channels = random.whole(1, 3), p = random.whole(1, 18), frames = random.whole(1, 2);
  const int64_t count = random.whole(1, 3), width = channels * frames * p * p;
  const int64_t past_cache = (int64_t(4) << 20) / int64_t(sizeof(Item));  // numbers of such a result
  const bool large = sizeof(Item) == 8 && random.chance(0.2);
  std::vector<std::vector<Item>> images;
  std::vector<Clip> clips;
  std::vector<Item> expected;
  for (int64_t n = 0; n < count; n++) {
    const int64_t t = random.whole(1, 2), y = random.whole(1, 3), x = large ? past_cache / (t * y * width) + 1 : 3;
    const bool interleaved = random.chance(0.3);
    Clip clip = {nullptr, t * frames, y * p, x * p, 0, 0, 0, 0};
    clip.column_stride = interleaved ? channels : 1;
    clip.row_stride = clip.width * clip.column_stride;
    clip.channel_stride = interleaved ? 1 : clip.height * clip.width;
    clip.frame_stride = channels * clip.height * clip.width;
    images.emplace_back(clip.frames * clip.frame_stride);
    for (Item& item : images.back()) item = Item(random.whole(0, 255));
    for (int64_t patch = 0; patch < t * y * x; patch++)
      for (int64_t i = 0; i < width; i++) {
        const int64_t column = patch % x * p + i % p, row = patch / x % y * p + i / p % p;
        const int64_t frame = patch / (x * y) * frames + i / (p * p) % frames, channel = i / (p * p * frames);
        expected.push_back(images.back()[frame * clip.frame_stride + channel * clip.channel_stride +
                                         row * clip.row_stride + column * clip.column_stride]);
      }
    clips.push_back(clip);
  }
  for (int64_t n = 0; n < count; n++) clips[n].data = images[n].data();
  std::vector<Line> lines(expected.size() * sizeof(Item) / sizeof(Line) + 1);
  Item* const patches = reinterpret_cast<Item*>(lines.data());
  const PackPatches problem = {int64_t(sizeof(Item)), count, clips.data(), channels, p, frames, patches};
  kernels.pack_patches_forward(problem, parallel);
  for (size_t i = 0; i < expected.size(); i++) expect_close("patches", double(patches[i]), double(expected[i]), 0);

  std::vector<std::vector<Item>> again;
  for (Clip& clip : clips) {  // put together without strides of their own
    clip.column_stride = 1;
    clip.row_stride = clip.width;
    clip.channel_stride = clip.height * clip.width;
    again.emplace_back(images[again.size()].size());
  }
  for (int64_t n = 0; n < count; n++) clips[n].data = again[n].data();
  kernels.pack_patches_backward(problem, parallel);
  std::fill_n(patches, expected.size(), Item(0));
  kernels.pack_patches_forward(problem, parallel);
  for (size_t i = 0; i < expected.size(); i++) expect_close("and back", double(patches[i]), double(expected[i]), 0);
}

Registered registered("pack_patches", [](Random& random, const Parallel& parallel) {
  check<uint8_t>(random, parallel);
  check<uint16_t>(random, parallel);
  check<float>(random, parallel);
  check<double>(random, parallel);
});

}  // namespace
}  // namespace VOT_ISA
}  // namespace vot
