#include "binding.h"

namespace vot {
namespace {

// An image [channels, height, width] or a clip [frames, channels, height, width].
Clip clip_of(const Tensor& x, int64_t temporal_patch_size, void* data) {
  const int64_t c = x.dim() - 3;  // the dimension of the channels
  Clip clip = {};
  clip.data = data;
  clip.frames = c ? x.size(0) : temporal_patch_size;
  clip.height = x.size(c + 1);
  clip.width = x.size(c + 2);
  clip.frame_stride = c ? x.stride(0) : 0;
  clip.channel_stride = x.stride(c);
  clip.row_stride = x.stride(c + 1);
  clip.column_stride = x.stride(c + 2);
  return clip;
}

PackPatches problem_of(const std::vector<Clip>& clips, const Tensor& first, int64_t patch_size,
                       int64_t temporal_patch_size, void* patches) {
  PackPatches problem = {};
  problem.item_bytes = int64_t(first.element_size());
  problem.clips = int64_t(clips.size());
  problem.clip = clips.data();
  problem.channels = first.size(first.dim() - 3);
  problem.patch_size = patch_size;
  problem.temporal_patch_size = temporal_patch_size;
  problem.patches = patches;
  return problem;
}

void pack_patches_forward(const std::vector<Tensor>& images, int64_t patch_size, int64_t temporal_patch_size,
                          const Tensor& values) {
  std::vector<Clip> clips;
  for (const Tensor& image : images)
    clips.push_back(clip_of(image, temporal_patch_size, const_cast<void*>(in(image))));
  const PackPatches problem = problem_of(clips, images[0], patch_size, temporal_patch_size, out(values));
  kernels().pack_patches_forward(problem, torch_threads());
}

void pack_patches_backward(const Tensor& d_values, int64_t patch_size, int64_t temporal_patch_size,
                           const std::vector<Tensor>& d_clips) {
  std::vector<Clip> clips;
  for (const Tensor& clip : d_clips) clips.push_back(clip_of(clip, temporal_patch_size, out(clip)));
  const PackPatches problem =
      problem_of(clips, d_clips[0], patch_size, temporal_patch_size, const_cast<void*>(in(d_values)));
  kernels().pack_patches_backward(problem, torch_threads());
}

}  // namespace
}  // namespace vot

STABLE_TORCH_LIBRARY_FRAGMENT(vot_kernels_cpp, library) {
  library.def(
      "pack_patches_forward(Tensor[] images, int patch_size, int temporal_patch_size, Tensor(a!) values) -> ()");
  library.def(
      "pack_patches_backward(Tensor d_values, int patch_size, int temporal_patch_size, Tensor(a!)[] d_clips) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(vot_kernels_cpp, CPU, library) {
  library.impl("pack_patches_forward", TORCH_BOX(&vot::pack_patches_forward));
  library.impl("pack_patches_backward", TORCH_BOX(&vot::pack_patches_backward));
}
