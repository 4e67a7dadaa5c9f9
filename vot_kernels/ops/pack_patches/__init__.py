"""Images and clips of any sizes in one buffer of patches: see `op.py`."""

from vot_kernels.ops.pack_patches.op import pack_patches, unpack_patches

__all__ = ["pack_patches", "unpack_patches"]
