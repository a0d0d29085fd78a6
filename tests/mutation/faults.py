"""Changes of a source file, each of them small and, if anybody can see it, wrong."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Fault", "faults_of"]

COMPARED = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
COMPUTED = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr,
    ast.BitXor: ast.BitAnd,
}  # fmt: skip
STRUCTURAL = {"property", "setter", "staticmethod", "classmethod", "contextmanager", "dataclass"}  # any test needs them


@dataclass(frozen=True)
class Fault:
    """One change: the text between two offsets becomes another one, of as many lines."""

    path: Path
    function: str  # the qualified name of the one that it is in; with a dot behind it, of a class
    lines: range
    source: str = field(repr=False)  # of the whole file, with the change
    before: str  # the line where the change begins
    after: str  # and what becomes of it

    @property
    def can_wait(self) -> bool:
        """Whether it can be planted after the import: in a function, which stays one that refers to its class."""
        return self.function[-1:] not in ("", ".") and "super()" not in self.before


def faults_of(path: Path) -> list[Fault]:
    """List all changes of a file."""
    source = path.read_text()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def offset(line: int, column: int) -> int:  # in characters, of one that ast counts in bytes
        return starts[line - 1] + len(source[starts[line - 1] :].encode()[:column].decode())

    found = {}
    for function, statement, first, last, new in _edits(ast.parse(source), "", None):
        start, end = offset(first.lineno, first.col_offset), offset(last.end_lineno, last.end_col_offset)
        text, padding = ast.unparse(new), "\n" * source.count("\n", start, end)  # lines stay where they are
        text = text + padding if isinstance(new, ast.stmt) else f"({text}{padding})"
        lines = range(first.lineno, max(last.end_lineno, statement.lineno) + 1)
        changed = source[:start] + text + source[end:]
        before, after = (code.splitlines()[first.lineno - 1].strip() for code in (source, changed))
        found[start, end, text] = Fault(path, function, lines, changed, before, after)
    return [*found.values()]


def _edits(node: ast.AST, function: str, statement: ast.stmt | None) -> Iterator[tuple]:
    """Yield the function and the statement of each change, the first and last node that go, and what comes instead."""
    statement = node if isinstance(node, ast.stmt) else statement
    for *ends, new in _changes(node):
        yield function, statement, ends[0], ends[-1], new
    named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    for name, value in ast.iter_fields(node):
        inside = function
        if named and name == "body":
            inside = f"{function}{'' if function.endswith('.') else '.'}{node.name}".lstrip(".")
            inside += "." * isinstance(node, ast.ClassDef)
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not _is_left_alone(name, child):
                yield from _edits(child, inside, statement)


def _is_left_alone(name: str, child: ast.AST) -> bool:
    """Whether nothing is planted there: in annotations, messages, imports for types, and what zip asserts."""
    return (
        name in ("annotation", "returns", "type_params", "exc", "cause")
        or isinstance(child, ast.JoinedStr)
        or (isinstance(child, ast.keyword) and child.arg == "strict")
        or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test))
        or (isinstance(child, ast.Assign) and "__all__" in ast.unparse(child.targets[0]))
    )


def _changes(node: ast.AST) -> Iterator[tuple]:  # noqa: PLR0912 - a table
    """Yield what goes, one node or the first and the last of several, and what comes instead."""
    true, false = ast.Constant(True), ast.Constant(False)
    match node:
        case ast.Compare(left, [op], [right]):
            yield node, ast.Compare(left, [COMPARED[type(op)]()], [right])
        case ast.BoolOp(op, values):
            yield node, ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values)
            yield from ((node, ast.BoolOp(op, [v for v in values if v is not value])) for value in values)
        case ast.UnaryOp(ast.Not() | ast.USub(), operand):
            yield node, operand
        case ast.If(test) | ast.IfExp(test):
            yield from ((test, value) for value in (true, false))
        case ast.While(test):
            yield test, false
        case ast.comprehension(ifs=tests):
            yield from ((test, true) for test in tests)
        case ast.Constant(bool(value)):
            yield node, ast.Constant(not value)
        case ast.Constant(int(value)):
            yield node, ast.Constant(value + 1)
        case ast.Constant(float(value)):
            yield node, ast.Constant(2 * value + 1)
        case ast.BinOp(left, op, right) if type(op) in COMPUTED:
            yield node, ast.BinOp(left, COMPUTED[type(op)](), right)
        case ast.Return(ast.AST() as value) if not isinstance(value, ast.Constant):
            yield node, ast.Return(ast.Constant(None))
        case ast.Break():
            yield node, ast.Continue()
        case (
            ast.Expr(ast.Call() | ast.Await()) | ast.AugAssign() | ast.Delete() | ast.Raise(ast.AST()) | ast.Continue()
        ):
            yield node, ast.Pass()
        case ast.Assign([ast.Attribute() | ast.Subscript()]) | ast.AnnAssign(ast.Attribute(), value=ast.AST()):
            yield node, ast.Pass()
        case ast.Try(handlers=handlers, finalbody=final):
            yield from ((h.body[0], h.body[-1], ast.Raise()) for h in handlers)
            yield from [(final[0], final[-1], ast.Pass())] if final else []
        case ast.With(items):
            nothing = ast.parse("__import__('contextlib').nullcontext()", mode="eval").body
            yield from ((item.context_expr, nothing) for item in items if item.optional_vars is None)
    match node:
        case ast.Call(ast.Attribute(value), [], []) if (
            not isinstance(value, ast.Call) or value.func.__class__ is not ast.Name
        ):
            yield node, value
        case ast.Call(function, args, keywords):
            yield from (
                (node, ast.Call(function, args, [k for k in keywords if k is not gone]))
                for gone in keywords
                if gone.arg != "strict"
            )
        case ast.FunctionDef(decorator_list=decorators) | ast.ClassDef(decorator_list=decorators):
            names = {ast.unparse(d).split("(")[0].split(".")[-1]: d for d in decorators}
            same = ast.parse("lambda f: f", mode="eval").body
            yield from ((decorator, same) for name, decorator in names.items() if name not in STRUCTURAL)
