"""Print how dense the files of the decode loop are, and every statement that holds too much; fail if either is bad."""

import ast
import io
import subprocess
import sys
import tokenize
from pathlib import Path

LOOP = (
    "generate",
    "sequences",
    "generation",
    "acceptance",
    "outputs",
    "proposals",
    "drafter",
    "target",
    "attention",
    "cache",
    "sampling",
)
LIMIT = 6.0  # expressions and statements per line of code
SPACE = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
)
KNOTS = (ast.IfExp, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
BLOCKS = (ast.FunctionDef, ast.ClassDef, ast.For, ast.While, ast.If, ast.With, ast.Try)


def is_docstring(node):
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def nodes_and_lines(text, tree):
    """How many expressions and statements, and how many lines of code without docstrings and comments."""
    lines, nodes = set(), list(ast.walk(tree))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in SPACE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in filter(is_docstring, nodes):
        lines.difference_update(range(node.lineno, node.end_lineno + 1))
    return sum(isinstance(node, (ast.expr, ast.stmt)) for node in nodes), len(lines)


def own_nodes(statement):
    """The nodes of a statement, without those of the statements inside it."""
    found = [statement]
    for node in found:
        found.extend(
            child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.stmt)
        )
    return found


def faults(statement):
    """Yield what a statement holds too much of."""
    nodes = own_nodes(statement)
    if sum(isinstance(node, KNOTS) for node in nodes) > 1:
        yield "more than one comprehension or conditional expression"
    for node in nodes:
        if isinstance(node, ast.Dict):
            spread = [
                value for key, value in zip(node.keys, node.values, strict=True) if key is None
            ]
            inside = [
                value
                for value in node.values
                if value not in spread and isinstance(value, ast.BinOp)
            ]
            if any(isinstance(value.op, ast.BitOr) for value in inside):
                yield "a union inside a dict"
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    if any(isinstance(target, ast.Tuple) and len(target.elts) > 2 for target in targets):
        yield "an assignment to more than two names"


def main():
    files = subprocess.run(
        ["git", "ls-files", "*.py"], capture_output=True, text=True, check=True
    ).stdout.split()
    bad, nodes, lines = False, 0, 0
    for path in (
        Path(name)
        for name in files
        if not name.startswith(("tests/", ".ci/", "benchmarks/", "examples/"))
    ):
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        if path.stem in {f"{name}_dflash" for name in LOOP}:
            more = nodes_and_lines(text, tree)
            nodes, lines = nodes + more[0], lines + more[1]
        for statement in (node for node in ast.walk(tree) if isinstance(node, ast.stmt)):
            for fault in faults(statement):
                print(f"{path}:{statement.lineno}: {fault}")
                bad = True
    print(
        f"{nodes / lines:.2f} expressions and statements per line of code in the decode loop, below {LIMIT} wanted"
    )
    sys.exit(bad or nodes / lines >= LIMIT)


if __name__ == "__main__":
    main()
