"""Code reduced to what it does: syntax trees without comments, docstrings and line numbers, so that a change of prose compiles nothing anew."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Mapping
from typing import Any


def of_source(source: str) -> str:
    """The syntax tree of a module or function, as text."""
    return ast.dump(_WithoutProse().visit(ast.parse(source)))


class _WithoutProse(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:  # noqa: N802
        return None if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) else node


def of_kernel(kernel: Any) -> list[str]:
    """The syntax of a @triton.jit function and of all that it calls, with the values of the constants that they read."""
    todo, found = [kernel], {}
    while todo:
        function = todo.pop()
        if id(function) not in found:
            syntax, mentioned = _of_function(function)
            found[id(function)] = [syntax, *(f"{name} = {value!r}" for name, value in mentioned.items() if _is_constant(value))]
            todo += [value for value in mentioned.values() if _is_kernel(value)]
    return [text for texts in found.values() for text in texts]


@functools.cache
def _of_function(function: Any) -> tuple[str, Mapping[str, Any]]:
    """Its syntax, and what its names and attributes of names stand for outside it: a superset, since a local name may hide one."""
    outside = {**function.__globals__, **inspect.getclosurevars(function.fn).nonlocals}

    def meaning(node: ast.AST) -> Any:
        if isinstance(node, ast.Name):
            return outside.get(node.id)
        return getattr(meaning(node.value), node.attr, None) if isinstance(node, ast.Attribute) else None

    nodes = [node for node in ast.walk(function.parse()) if isinstance(node, (ast.Name, ast.Attribute))]
    mentioned = {ast.unparse(node): meaning(node) for node in nodes}
    return f"{getattr(function, 'noinline', False)} {of_source(function.src)}", dict(sorted(mentioned.items()))


def _is_kernel(value: Any) -> bool:
    return hasattr(value, "cache_key")


def _is_constant(value: Any) -> bool:
    import triton.language as tl

    return isinstance(value, tl.constexpr)
