"""Triton's interpreter, three times as fast, and no more accurate than a GPU.

``speed_up`` takes out what it does again and again; the numbers stay the same. It patches ``triton.language`` at every
call of a device function, though the launch has done so already; builds its table of dtypes at every look into it;
wraps each side of each shape anew for every value; and looks for overflows of integers whose report it then leaves out,
unless it debugs (Triton 3.6 and 3.7).

``round_like_a_gpu`` adds to NumPy's fp32 functions the errors that CUDA documents for the instructions in their place.
"""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def speed_up() -> None:
    """Patch once a launch, and look dtypes up once."""
    patch, dtype_of = interpreter._patch_lang, interpreter._get_np_dtype
    whole_language = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})  # what any kernel may see of it
    running: list[Any] = []
    known: dict[str, Any] = {}

    def patch_once(function: Any) -> Any:
        if running:
            return interpreter._LangPatchScope()
        scope = patch(whole_language)
        restore = scope.restore

        def end() -> None:
            running.clear()
            restore()

        scope.restore = end
        running.append(scope)
        return scope

    def look_up(dtype: Any) -> Any:
        if type(dtype) is not tl.dtype:
            return dtype_of(dtype)
        if dtype.name not in known:
            known[dtype.name] = dtype_of(dtype)
        return known[dtype.name]

    interpreter._patch_lang, interpreter._get_np_dtype = patch_once, look_up
    _share_shapes()
    look_for_overflows = TritonSemantic.binary_op_sanitize_overflow_impl

    def look_if_told(self: Any, *args: Any) -> None:
        if self.builder.options.debug:
            look_for_overflows(self, *args)

    TritonSemantic.binary_op_sanitize_overflow_impl = look_if_told


def round_like_a_gpu() -> None:
    """Move the results of fp32 division, exp2 and rsqrt by up to 2 units in the last place, those of sqrt by up to 1.

    exp and log are exp2 and log2 times a constant, as the approximate instructions compute them; Triton's logarithm on
    CUDA is better. fma rounds once. What a GPU rounds correctly stays correct: div_rn, sqrt_rn, and exp2 of integers.
    """
    for name, function in {
        "fdiv": lambda a, b: _off(a / b, 2),
        "sqrt": lambda a: _off(np.sqrt(a), 1),
        "rsqrt": lambda a: _off(_rounded(1 / np.sqrt(a.astype(np.float64))), 2),
        "exp2": _exp2,
        "exp": lambda a: _exp2(a * np.float32(math.log2(math.e))),
        "log2": _log2,
        "log": lambda a: _log2(a) * np.float32(math.log(2)),
        "fma": lambda a, b, c: _rounded(a.astype(np.float64) * b + c),  # the product is exact in float64
    }.items():
        _replace_for_fp32(f"create_{name}", function)
    _sum_products_like_a_gpu()


def _sum_products_like_a_gpu() -> None:
    """A product of fp32 matrices is a chain of fma for every element; NumPy sums in blocks, with smaller errors.

    Triton's compiler makes x + tl.dot(a, b) into tl.dot(a, b, x), which is one chain, and so does this.
    """
    _replace_for_fp32("create_dot", _dot)
    make, add = (getattr(interpreter.InterpreterBuilder, f"create_{name}") for name in ("dot", "fadd"))

    def product(self: Any, a: Any, b: Any, total: Any, *options: Any) -> Any:
        result = make(self, a, b, total, *options)
        if a.data.dtype == np.float32 and not total.data.any():
            result.factors = a, b
        return result

    def added(self: Any, x: Any, y: Any) -> Any:
        for one, other in ((y, x), (x, y)):
            if hasattr(one, "factors"):
                return make(self, *one.factors, other, None, None)
        return add(self, x, y)

    interpreter.InterpreterBuilder.create_dot = product
    interpreter.InterpreterBuilder.create_fadd = added


def _replace_for_fp32(name: str, function: Callable[..., Any]) -> None:
    builder = interpreter.InterpreterBuilder
    of_others = getattr(builder, name)

    def operation(self: Any, *operands: Any) -> Any:
        if operands[0].data.dtype != np.float32:
            return of_others(self, *operands)
        with np.errstate(all="ignore"):  # a GPU does not warn
            numbers = (x.data for x in operands if isinstance(x, interpreter.TensorHandle))
            return interpreter.TensorHandle(function(*numbers), operands[0].dtype.scalar)

    setattr(builder, name, operation)


def _rounded(exact: Any) -> Any:
    return exact.astype(np.float32)


def _error(y: Any) -> Any:
    """From -1 to 1, a hash of y's bits: equal runs have equal errors."""
    return ((y.view(np.uint32) * np.uint32(0x9E3779B1)) >> np.uint32(8)).astype(np.float64) / 2**23 - 1


def _off(y: Any, ulps: int) -> Any:
    """fp32 numbers moved by up to ``ulps`` units in the last place; zeros, infinities and NaN stay."""
    moved = _rounded(y + _error(y) * ulps * np.spacing(np.abs(y)))
    return np.where(np.isfinite(y) & (y != 0), moved, y)


def _exp2(x: Any) -> Any:
    y = _rounded(np.exp2(x.astype(np.float64)))
    return np.where(x == np.floor(x), y, _off(y, 2))


def _log2(x: Any) -> Any:
    """Off by up to 2^-22 from 0.5 to 2, where the result is small, by up to 2 units in the last place elsewhere."""
    exact = np.log2(x.astype(np.float64))
    y = _rounded(exact)
    return np.where((x >= 0.5) & (x <= 2.0), _rounded(exact + _error(y) * 2.0**-22), _off(y, 2))


def _dot(a: Any, b: Any, total: Any) -> Any:
    """fma(a[:, k], b[k], total) for one k after the other, as the units for fp32 do it."""
    for column, row in zip(a.astype(np.float64).T, b.astype(np.float64), strict=True):
        total = _rounded(total + column[:, None] * row)  # the products are exact in float64
    return total


def _share_shapes() -> None:
    """Blocks of equal shapes share one; what is made of a shape is made once."""
    make_type, make_tensor = tl.core.block_type.__init__, tl.core.tensor.__init__
    of_types: dict[tuple[int, ...], tuple[Any, int]] = {}
    names: dict[tuple[tuple[int, ...], str], str] = {}
    of_tensors: dict[int, tuple[Any, Any, Any]] = {}

    def type_of_block(self: Any, element_ty: Any, shape: Any) -> None:
        key = tuple(side.value if isinstance(side, tl.constexpr) else side for side in shape)
        named = (key, element_ty.name)
        if named not in names:
            make_type(self, element_ty, shape)
            names[named] = self.name
            self.shape, self.numel = of_types.setdefault(key, (self.shape, self.numel))
            return
        self.element_ty, self.name = element_ty, names[named]
        self.shape, self.numel = of_types[key]

    def tensor(self: Any, handle: Any, type: Any) -> None:
        shape = type.shape if type.is_block() else None
        if (made := of_tensors.get(id(shape))) is None:
            make_tensor(self, handle, type)
            of_tensors[id(shape)] = self.shape, self.numel, shape  # held, so that no other has its id
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel, _ = made

    tl.core.block_type.__init__, tl.core.tensor.__init__ = type_of_block, tensor
