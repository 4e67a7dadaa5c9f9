"""Triton device code, installed as `vot_kernels.kernels`.

One folder per family of kernels, and `common/` for what families share. They hold only `@triton.jit` functions: no
`torch.nn`, no autograd, no environment reads. Launchers live in `vot_kernels/ops/`, block sizes in
`vot_kernels/tuning/`. The parent folder has no `__init__.py` on purpose: a regular package named `kernels` at the
repository root would shadow the package of that name that transformers imports.
"""
