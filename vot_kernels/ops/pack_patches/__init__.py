"""Packing of images and clips of any size into one buffer of patches: see `op.py`."""

from vot_kernels.ops.pack_patches.op import pack_patches, unpack_patches

__all__ = ["pack_patches", "unpack_patches"]
