"""Small edits of source code, found by walking its syntax tree: what a slip of the hand would do.

Kept mutation testers do not fit here: mutmut rewrites the files of a project and runs its tests in
new processes, cosmic-ray brings thirteen dependencies and no operator for dropped statements,
dropped conversions or swapped arguments. What they share with this is the list of operators.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.GtE),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.LtE),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
ARITHMETIC: dict[type[ast.operator], tuple[type[ast.operator], ...]] = {
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Mult, ast.Mod),
    ast.Mod: (ast.FloorDiv,),
    ast.Pow: (ast.Mult,),
    ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,),
    ast.LShift: (ast.RShift,),
    ast.RShift: (ast.LShift,),
}
UNSEEN = ("strict", "device")
"""Keywords that are left alone: a check of our own, and what only shows on another device."""
COMMUTATIVE = ("max", "min", "maximum", "minimum")
NOT_COMMUTATIVE = (ast.Sub, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.MatMult)
OPPOSITES = (
    ("min", "max"),
    ("amin", "amax"),
    ("minimum", "maximum"),
    ("any", "all"),
    ("zeros", "ones"),
    ("zeros_like", "ones_like"),
    ("new_zeros", "new_ones"),
    ("zeros", "empty"),
    ("zeros_like", "empty_like"),
    ("new_zeros", "new_empty"),
    ("sum", "amax"),
    ("start", "stop"),
)
DROPPED_METHODS = frozenset(
    (
        "add_",
        "amax",
        "clamp",
        "clone",
        "contiguous",
        "cumsum",
        "div_",
        "double",
        "exp",
        "exp_",
        "expand",
        "float",
        "int",
        "log",
        "long",
        "masked_fill",
        "masked_fill_",
        "mul_",
        "sub_",
        "sum",
        "to",
        "transpose",
    )
)
"""Methods of a tensor, or that give one; without the call the tensor itself is used."""
MODULES = frozenset({"torch", "checks", "blocks", "windows"})


@dataclass(frozen=True)
class Change:
    """Replace a piece of a text.

    Args:
        operator: the kind of edit.
        start: where it begins.
        end: behind its last character.
        after: what stands there instead.
        function: the function that it lies in.
    """

    operator: str
    start: int
    end: int
    after: str
    function: str

    def apply(self, text: str) -> str:
        """Return the text with the change."""
        return text[: self.start] + self.after + text[self.end :]


def changes(text: str) -> list[Change]:
    """Return every edit of the functions in a module, in the order of their places.

    Docstrings, annotations, and constants of the module are left alone.
    """
    starts = _line_starts(text)
    found = {
        _change(text, starts, operator, node, after, name): None
        for name, function in _functions(ast.parse(text))
        for operator, node, after in _edits(function)
        if after not in (ast.unparse(node), f"({ast.unparse(node)})")
    }
    return sorted(found, key=lambda c: (c.start, c.end, c.operator, c.after))


Edit = tuple[str, ast.AST, str]
"""The operator, the node that is replaced, and the text in its place."""


def _edits(function: ast.FunctionDef) -> Iterator[Edit]:
    for decorator in function.decorator_list:
        yield "decorator dropped", decorator, "(lambda function: function)"
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    for statement in body:
        yield from _statement_edits(statement, [])
    for default in [*function.args.defaults, *filter(None, function.args.kw_defaults)]:
        yield from _expression_edits(default)


def _statement_edits(statement: ast.stmt, assigned: list[str]) -> Iterator[Edit]:
    """Yield edits of a statement and all within; `assigned` are names that have a value before."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return
    droppable = isinstance(statement, (ast.Expr, ast.AugAssign, ast.If, ast.For, ast.Continue))
    if isinstance(statement, ast.Assign):
        names = [n.id for t in statement.targets for n in ast.walk(t) if isinstance(n, ast.Name)]
        stores = any(isinstance(t, (ast.Subscript, ast.Attribute)) for t in statement.targets)
        droppable = stores or set(names) <= set(assigned)
        assigned += names
    if droppable:
        yield "statement dropped", statement, "pass"
    if isinstance(statement, ast.AugAssign):
        yield from _augmented(statement)
    for _, value in ast.iter_fields(statement):
        for node in value if isinstance(value, list) else [value]:
            if isinstance(node, ast.stmt):
                yield from _statement_edits(node, assigned)
            elif isinstance(node, ast.expr):
                yield from _expression_edits(node)
            elif isinstance(node, ast.withitem):
                yield from _expression_edits(node.context_expr)
    if isinstance(statement, (ast.If, ast.While)):
        yield "condition negated", statement.test, f"not ({ast.unparse(statement.test)})"


def _augmented(statement: ast.AugAssign) -> Iterator[Edit]:
    for other in ARITHMETIC.get(type(statement.op), ()):
        changed = copy.deepcopy(statement)
        changed.op = other()
        yield "arithmetic", statement, ast.unparse(changed)
    target, value = ast.unparse(statement.target), ast.unparse(statement.value)
    yield "sum replaced by its last term", statement, f"{target} = {value}"


def _expression_edits(expression: ast.expr) -> Iterator[Edit]:
    skipped = {id(n) for part in _left_alone(expression) for n in ast.walk(part)}
    for node in ast.walk(expression):
        if id(node) in skipped:
            continue
        for kind, edits in _EXPRESSIONS.items():
            if isinstance(node, kind):
                yield from ((name, node, f"({after})") for name, after in edits(node))
        if isinstance(node, ast.Subscript):
            yield from (("slice bound", node, after) for after in _slices(node))


def _left_alone(expression: ast.expr) -> Iterator[ast.expr]:
    """Yield annotations, and the values of keywords that show nothing."""
    for node in ast.walk(expression):
        if isinstance(node, ast.arg) and node.annotation:
            yield node.annotation
        if isinstance(node, ast.keyword) and node.arg in UNSEEN:
            yield node.value


def _compare(node: ast.Compare) -> Iterator[tuple[str, str]]:
    for index, operator in enumerate(node.ops):
        for other in COMPARISONS.get(type(operator), ()):
            changed = copy.deepcopy(node)
            changed.ops[index] = other()
            yield "comparison", ast.unparse(changed)


def _constant(node: ast.Constant) -> Iterator[tuple[str, str]]:
    value = node.value
    if isinstance(value, bool):
        yield "boolean", str(not value)
    elif isinstance(value, int):
        yield "constant", str(value + 1)
        yield "constant", str(value - 1)
    elif isinstance(value, float):
        yield "constant", repr(value * 2)
        yield "constant", repr(value + 1)


def _arithmetic(node: ast.BinOp) -> Iterator[tuple[str, str]]:
    left, right = f"({ast.unparse(node.left)})", f"({ast.unparse(node.right)})"
    for other in ARITHMETIC.get(type(node.op), ()):
        changed = copy.deepcopy(node)
        changed.op = other()
        yield "arithmetic", ast.unparse(changed)
    if isinstance(node.op, NOT_COMMUTATIVE):
        changed = copy.deepcopy(node)
        changed.left, changed.right = changed.right, changed.left
        yield "operands swapped", ast.unparse(changed)
    yield "operand dropped", left
    yield "operand dropped", right


def _unary(node: ast.UnaryOp) -> Iterator[tuple[str, str]]:
    yield "sign or negation dropped", ast.unparse(node.operand)


def _boolean(node: ast.BoolOp) -> Iterator[tuple[str, str]]:
    changed = copy.deepcopy(node)
    changed.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
    yield "and, or", ast.unparse(changed)


def _choice(node: ast.IfExp) -> Iterator[tuple[str, str]]:
    yield "always the first", ast.unparse(node.body)
    yield "always the other", ast.unparse(node.orelse)


def _call(node: ast.Call) -> Iterator[tuple[str, str]]:
    if isinstance(node.func, ast.Attribute) and node.func.attr in DROPPED_METHODS:
        owner = node.func.value
        if not (isinstance(owner, ast.Name) and owner.id in MODULES):
            yield "method dropped", ast.unparse(owner)
    name = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
    for index in range(0 if name in COMMUTATIVE else len(node.args) - 1):
        changed = copy.deepcopy(node)
        changed.args[index : index + 2] = changed.args[index : index + 2][::-1]
        yield "arguments swapped", ast.unparse(changed)
    for index, keyword in enumerate(node.keywords):
        if keyword.arg in UNSEEN:
            continue
        changed = copy.deepcopy(node)
        del changed.keywords[index]
        yield "keyword dropped", ast.unparse(changed)


def _name(node: ast.Attribute | ast.Name) -> Iterator[tuple[str, str]]:
    if not isinstance(node.ctx, ast.Load):
        return
    name = node.attr if isinstance(node, ast.Attribute) else node.id
    for pair in OPPOSITES:
        if name in pair:
            other = pair[1 - pair.index(name)]
            changed = copy.deepcopy(node)
            setattr(changed, "attr" if isinstance(node, ast.Attribute) else "id", other)
            yield "opposite", ast.unparse(changed)


def _slices(node: ast.Subscript) -> Iterator[str]:
    """Yield a subscript with one bound of one slice moved by one or left out."""
    parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    for index, part in enumerate(parts):
        if not isinstance(part, ast.Slice):
            continue
        for bound in ("lower", "upper", "step"):
            old: ast.expr | None = getattr(part, bound)
            texts = [None] if old else []
            if old and bound != "step":
                texts += [f"({ast.unparse(old)}) + 1", f"({ast.unparse(old)}) - 1"]
            elif bound != "step":
                texts += ["1" if bound == "lower" else "-1"]
            for text in texts:
                changed = copy.deepcopy(node)
                inner = changed.slice
                target = inner.elts[index] if isinstance(inner, ast.Tuple) else inner
                value = None if text is None else ast.parse(text, mode="eval").body
                setattr(target, bound, value)
                yield ast.unparse(changed)


_EXPRESSIONS: dict[type[ast.expr], Callable[..., Iterator[tuple[str, str]]]] = {
    ast.Compare: _compare,
    ast.Constant: _constant,
    ast.BinOp: _arithmetic,
    ast.UnaryOp: _unary,
    ast.BoolOp: _boolean,
    ast.IfExp: _choice,
    ast.Call: _call,
    ast.Attribute: _name,
    ast.Name: _name,
}


def _functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """Yield the functions and methods of a module, and those within them, with their names."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            yield f"{prefix}{node.name}", node
            yield from _functions(node, f"{prefix}{node.name}.<locals>.")
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.stmt):
            yield from _functions(node, prefix)


def _line_starts(text: str) -> list[int]:
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    return starts


def _change(
    text: str, starts: list[int], operator: str, node: ast.AST, after: str, function: str
) -> Change:
    """Place an edit in the text; columns of a syntax tree count bytes, here all are ASCII."""
    assert text.isascii()
    first: ast.expr = node  # type: ignore[assignment]
    start = starts[first.lineno - 1] + first.col_offset
    end = starts[(first.end_lineno or 0) - 1] + (first.end_col_offset or 0)
    return Change(operator, start, end, after, function)
