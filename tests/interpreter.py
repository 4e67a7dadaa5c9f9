"""Patches that make Triton's interpreter more than twice as fast, and the same on every machine.

Before a launch, and again before each call inside a kernel, the interpreter replaces the builtins of
`triton.language` and looks for them with `inspect.getmembers`. Here the set of builtins, which does not change, is
looked for once, and a module is replaced once in a launch. Three quarters of the operations on int32 were the search
for an overflow, whose outcome the interpreter throws away unless it debugs. The table of NumPy's dtypes was built anew
for every operation, and so were the shape of each tensor and its type, which nothing changes afterwards.

One patch changes results. NumPy multiplies matrices with kernels chosen by the processor; some of them sum an element
of a product in an order that depends on its row, so that a row has other bits in another block. A tensor core does not.
Here each element of a product is summed in float64 and rounded once.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np


def speed_up() -> None:
    """Patch it for the rest of this process, as far as this Triton's interpreter works in this way."""
    from triton.runtime import interpreter

    names = (
        "_patch_builtin",
        "_patch_attr",
        "_patch_lang",
        "_LangPatchScope",
        "_get_np_dtype",
        "interpreter_builder",
    )
    if any(not hasattr(interpreter, name) for name in names):
        return
    _look_for_builtins_once(interpreter)
    _patch_once_in_a_launch(interpreter)
    _look_up_dtypes(interpreter)
    _share_shapes()
    _leave_equal_shapes_alone()
    _leave_out_what_is_thrown_away(interpreter)
    _round_products_once(interpreter)


def _look_for_builtins_once(interpreter: Any) -> None:
    from triton import language

    is_builtin = language.core.is_builtin

    def builtins(package: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    packages = (language, language.core, language.math, language.tensor, language.core.tensor_descriptor_base)
    known = {package: builtins(package) for package in packages}

    def patch_builtin(package: Any, builder: Any, scope: Any) -> None:
        for name in known[package] if package in known else builtins(package):
            if is_builtin(member := getattr(package, name)):
                interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtin


def _patch_once_in_a_launch(interpreter: Any) -> None:
    from triton import language

    patch, patched = interpreter._patch_lang, set[ModuleType]()

    class Scope(interpreter._LangPatchScope):
        def restore(self) -> None:
            """A launch ends with this; a call inside a kernel restores nothing."""
            super().restore()
            patched.clear()

    @functools.cache
    def used_by(function: Callable[..., Any]) -> set[ModuleType]:
        return {
            value for value in function.__globals__.values() if value is language or value is language.core
        }

    def patch_once(function: Callable[..., Any]) -> Any:
        if patched and used_by(function) and used_by(function) <= patched:
            return Scope()
        scope = patch(function)
        patched.update(used_by(function))
        return scope

    interpreter._LangPatchScope, interpreter._patch_lang = Scope, patch_once


def _look_up_dtypes(interpreter: Any) -> None:
    compute, known = interpreter._get_np_dtype, {}

    def look_up(dtype: Any) -> Any:
        scalar = dtype.scalar
        if scalar.name not in known:
            known[scalar.name] = compute(scalar)
        return known[scalar.name]

    interpreter._get_np_dtype = look_up


def _share_shapes() -> None:
    from triton.language import core

    make_type, make_block = core.block_type.__init__, core.block_type.with_element_ty
    make_tensor = core.tensor.__init__
    types: dict[Any, Any] = {}
    blocks: dict[Any, Any] = {}
    shapes: dict[Any, Any] = {}

    def type_(self: Any, scalar: Any, shape: Any) -> None:
        key = (*(getattr(size, "value", size) for size in shape), scalar.name)
        if key not in types:
            make_type(self, scalar, shape)
            types[key] = self.shape, self.numel, self.name
        self.element_ty = scalar
        self.shape, self.numel, self.name = types[key]

    def block(self: Any, scalar: Any) -> Any:
        if scalar.is_ptr():
            return make_block(self, scalar)
        key = (*self.shape, scalar.name)
        if key not in blocks:
            blocks[key] = make_block(self, scalar)
        return blocks[key]

    def tensor(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape) if type.is_block() else ()
        if key not in shapes:
            make_tensor(self, handle, type)
            shapes[key] = self.shape, self.numel
        self.shape, self.numel = shapes[key]
        self.handle, self.type, self.dtype = handle, type, type.scalar

    core.block_type.__init__, core.block_type.with_element_ty, core.tensor.__init__ = type_, block, tensor


def _leave_equal_shapes_alone() -> None:
    from triton.language.semantic import TritonSemantic

    broadcast = TritonSemantic.broadcast_impl_value

    def broadcast_others(self: Any, a: Any, b: Any) -> Any:
        blocks = a.type.is_block(), b.type.is_block()
        if blocks == (False, False) or (all(blocks) and a.type.shape.values == b.type.shape.values):
            return a, b
        return broadcast(self, a, b)

    TritonSemantic.broadcast_impl_value = broadcast_others


def _leave_out_what_is_thrown_away(interpreter: Any) -> None:
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _round_products_once(interpreter: Any) -> None:
    def create_dot(
        self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any
    ) -> Any:
        product = np.matmul(a.data, b.data, dtype=np.float64).astype(d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot
