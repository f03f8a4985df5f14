"""Triton's interpreter, without repetitions that take most of its time. No result changes.

A kernel of a test makes thousands of calls on tiles of a few hundred numbers, so what the interpreter does beside
numpy is what a test waits for.
"""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

PLAIN = frozenset("int1 int8 int16 int32 int64 uint8 uint16 uint32 uint64 fp16 bf16 fp32 fp64".split())


def hasten() -> None:
    """Changes Triton in this process; without Triton nothing."""
    try:
        from triton.language import core
        from triton.language.semantic import TritonSemantic
        from triton.runtime import interpreter
    except ImportError:
        return
    _replace_once_per_kernel(interpreter)
    _rewrite_once_per_code(interpreter)
    _know_types(interpreter, core)
    _leave_operands_alone(TritonSemantic, core)


def _replace_once_per_kernel(interpreter: Any) -> None:
    """Names of triton.language are replaced before a kernel, and again before every call of a device function.

    Once for each kernel and each module whose functions it calls is enough: nothing is put back before the kernel ends.
    """
    replace, run = interpreter._patch_lang, interpreter.GridExecutor.__call__
    done: set[int] = set()

    def once(fn: Callable[..., Any]) -> Any:
        if id(fn.__globals__) in done:
            return None
        done.add(id(fn.__globals__))
        return replace(fn)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        done.clear()
        return run(*args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = once, kernel


def _rewrite_once_per_code(interpreter: Any) -> None:
    """Functions are parsed and rewritten before their first call. Copies of one, as the modules of seeded bugs have
    them, share the code.
    """
    rewrite, known = interpreter.FunctionRewriter.rewrite_ast, dict[CodeType, CodeType]()

    def rewritten(self: Any) -> Any:
        fn = self.fn
        code = known.get(fn.__code__)
        if code is None or fn.__closure__:
            found = rewrite(self)
            known[fn.__code__] = found.__code__
            return found
        for name, value in vars(interpreter).items():  # what rewritten code calls, as the interpreter puts it there
            fn.__globals__.setdefault(name, value)
        code = code.replace(co_filename=fn.__code__.co_filename)
        copy = FunctionType(code, fn.__globals__, fn.__name__, fn.__defaults__)
        copy.__annotations__, copy.__kwdefaults__ = fn.__annotations__, fn.__kwdefaults__
        return copy

    interpreter.FunctionRewriter.rewrite_ast = rewritten


def _know_types(interpreter: Any, core: Any) -> None:
    """What follows from a type alone is made for the first value of the type and taken over by the others."""
    numpy_type, dtypes = interpreter._get_np_dtype, dict[str, Any]()
    make_block, blocks = core.block_type.__init__, dict[Any, dict[str, Any]]()
    make_tensor, tensors = core.tensor.__init__, dict[str, dict[str, Any]]()

    def known_dtype(found: Any) -> Any:
        if found.name not in dtypes:
            dtypes[found.name] = numpy_type(found)
        return dtypes[found.name]

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *shape)
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = dict(self.__dict__)
        self.__dict__.update(blocks[key])
        self.element_ty = element_ty

    def tensor(self: Any, handle: Any, type: Any) -> None:
        if type.name not in tensors:
            make_tensor(self, handle, type)
            tensors[type.name] = dict(self.__dict__)
        self.__dict__.update(tensors[type.name])
        self.handle, self.type, self.dtype = handle, type, type.scalar

    interpreter._get_np_dtype, core.block_type.__init__, core.tensor.__init__ = known_dtype, block, tensor


def _leave_operands_alone(semantic: Any, core: Any) -> None:
    """Operands of one type and shape are neither cast nor broadcast, and a check of overflow that nobody reads is left
    out: in place of one sum of int32 it makes two of int64, two comparisons and their conjunction.
    """
    convert, spread = semantic.binary_op_type_checking_impl, semantic.broadcast_impl_value
    check = semantic.binary_op_sanitize_overflow_impl

    def converted(self: Any, left: Any, right: Any, *pointers: Any, **how: Any) -> Any:
        """Division has further rules for halves: its call has more arguments than those of pointers."""
        alike = not how and len(pointers) < 3 and type(left) is type(right) is core.tensor
        if alike and left.type.name == right.type.name and left.dtype.name in PLAIN:
            return left, right
        return convert(self, left, right, *pointers, **how)

    def broadcast(self: Any, left: Any, right: Any) -> Any:
        if left.type.is_block() and right.type.is_block() and left.type.shape == right.type.shape:
            return left, right
        return spread(self, left, right)

    def checked(self: Any, *operands: Any) -> None:
        if self.builder.options.debug:
            check(self, *operands)

    semantic.binary_op_type_checking_impl, semantic.broadcast_impl_value = converted, broadcast
    semantic.binary_op_sanitize_overflow_impl = checked
