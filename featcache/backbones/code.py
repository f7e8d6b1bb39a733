"""A user's network as a digest: the code that it runs, and the values that are not among its weights.

The code is read from memory, not from files: what a process has loaded is what it runs, and a notebook has no file. Of
libraries the names count alone. What a network reads from elsewhere while it runs, nobody can see.
"""

from __future__ import annotations

import builtins
import functools
import hashlib
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
from torch import Tensor, fx, nn

OURS = {"torch", "torchvision", "timm", "efficientnet_lite_pytorch", "featcache"}
LIBRARIES = {*OURS, "numpy", "scipy", "PIL", "sklearn", "builtins", *sys.stdlib_module_names} - {"__main__"}
# Of a class: what says nothing of what it does.
SILENT = {"__module__", "__dict__", "__weakref__", "__doc__", "__annotations__", "__firstlineno__"}
SILENT |= {"__static_attributes__"}


def hash_code(network: nn.Module) -> str:
    """SHA-256 of a network's structure, its code and that of all functions it refers to, its hooks and attributes."""
    digest = hashlib.sha256()
    for line in _Reader().read_network(network):
        digest.update(line.encode(errors="surrogatepass") + b"\n")
    return digest.hexdigest()


def is_library(value: FunctionType | type | ModuleType) -> bool:
    """Whether something belongs to a library, whose code is known by its name."""
    name = value.__name__ if isinstance(value, ModuleType) else value.__module__ or ""
    if name == "builtins":  # what is made without a module says so too
        return isinstance(value, ModuleType) or getattr(builtins, value.__name__, None) is value
    return name.partition(".")[0] in LIBRARIES


class _Reader:
    """Describes values line by line, each function and class once."""

    def __init__(self) -> None:
        self.seen: dict[int, Any] = {}  # the values are kept, or their identities would be used again

    def read_network(self, network: nn.Module) -> Iterator[str]:
        """A network and everything in it."""
        yield re.sub(" at 0x[0-9a-f]+", "", repr(network))
        state = network.state_dict()
        for name, buffer in network.named_buffers():
            if name not in state:
                yield name
                yield from self.read(buffer)
        for name, module in network.named_modules():
            yield name
            own = vars(module)
            if isinstance(module, fx.GraphModule):
                yield module.code
            elif not is_library(type(module)):
                yield from self.read(type(module))
                yield from self.read({key: value for key, value in own.items() if _is_attribute(key, value)})
            yield from self.read([*own["_forward_hooks"].values(), *own["_forward_pre_hooks"].values()])
            if "forward" in own:
                yield from self.read(own["forward"])

    def read(self, value: Any) -> Iterator[str]:
        """Any value."""
        if isinstance(value, Tensor):
            value = value.detach().cpu().numpy()
        if isinstance(value, np.ndarray):
            yield f"{value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
        elif value is None or isinstance(value, bool | int | float | complex | str | bytes | np.generic):
            yield repr(value)
        elif isinstance(value, tuple):  # NOTE: not "again": whether equal constants are one object is up to Python
            for item in value:
                yield from self.read(item)
        elif isinstance(value, set | frozenset):
            yield from sorted(map(repr, value))
        elif isinstance(value, nn.Module | ModuleType):
            yield type(value).__name__  # read where it is registered, or by the names that are used of it
        elif id(value) in self.seen:
            yield "again"
        else:
            self.seen[id(value)] = value
            yield from self.read_inside(value)

    def read_inside(self, value: Any) -> Iterator[str]:
        """A value that has others inside."""
        if isinstance(value, Mapping):
            for key in sorted(value, key=repr):
                yield repr(key)
                yield from self.read(value[key])
        elif isinstance(value, list):
            for item in value:
                yield from self.read(item)
        elif isinstance(value, functools.partial):
            yield from self.read([value.func, value.args, value.keywords])
        elif isinstance(value, staticmethod | classmethod | MethodType):
            yield from self.read(value.__func__)
        elif isinstance(value, property):
            yield from self.read([value.fget, value.fset])
        elif isinstance(value, FunctionType):
            yield from self.read_function(value)
        elif isinstance(value, type):
            yield from self.read_class(value)
        else:
            yield from self.read(type(value))
            yield from self.read(dict(getattr(value, "__dict__", {})))

    def read_function(self, function: FunctionType) -> Iterator[str]:
        """A function: its code, what it encloses, and the globals that it names."""
        yield f"{function.__module__}.{function.__qualname__}"
        if is_library(function):
            return
        yield from self.read_code(function.__code__)
        yield from self.read([function.__defaults__, function.__kwdefaults__])
        yield from self.read([_open_cell(cell) for cell in function.__closure__ or ()])
        names = sorted(set(_list_names(function.__code__)))
        for name in names:
            value = function.__globals__.get(name)
            if isinstance(value, ModuleType) and not is_library(value):
                yield from self.read({inner: vars(value)[inner] for inner in names if inner in vars(value)})
            elif value is not None:
                yield from self.read(value)

    def read_code(self, code: CodeType) -> Iterator[str]:
        """Byte code and constants, whatever line they stand in."""
        yield code.co_code.hex()
        yield repr((code.co_names, code.co_varnames, code.co_freevars))
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                yield from self.read_code(constant)
            else:
                yield from self.read(constant)

    def read_class(self, kind: type) -> Iterator[str]:
        """A class and those that it inherits from."""
        for one in inspect.getmro(kind):
            yield f"{one.__module__}.{one.__qualname__}"
            if not is_library(one):
                yield from self.read({name: value for name, value in vars(one).items() if name not in SILENT})


def _is_attribute(name: str, value: Any) -> bool:
    """Whether a network's attribute is one of its author's, and not torch's own book-keeping."""
    return not name.startswith("_") and name not in ("training", "forward") and not isinstance(value, nn.Module)


def _list_names(code: CodeType) -> Iterator[str]:
    """Names of globals and attributes that code uses, that of functions inside it too."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _list_names(constant)


def _open_cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None
