"""Triton device code, installed as `vot_kernels.kernels`.

This release has none: every op runs on the `torch` and `reference` backends. Kernels go into one folder
per family (`attention/`, `aoe/`, `fused/`, and `common/` for what they share) and hold `@triton.jit`
functions alone: no `torch.nn`, no autograd, no environment reads. Launchers live in `vot_kernels/ops/`.
The parent folder has no `__init__.py` on purpose: a regular package named `kernels` at the repository root
would shadow the package of that name that transformers imports.
"""
