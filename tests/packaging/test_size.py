"""The size of the code and of its functions: what does not count as code, and the limits."""

import ast
import io
import textwrap
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[2]
MOST_CODE_LINES = 34_852
"""Lowered with every merge; the aim is 32,500. A feature raises it by its own budget of lines."""
MOST_FUNCTION_LINES, MOST_PARAMETERS = 60, 8
"""Of a function; a command has as many parameters as options."""
FOLDERS = ("rap_env", "agents", "experiments", "benchmarks", "examples", "docs", "tools")
NO_CODE = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
    tokenize.ENDMARKER, tokenize.ENCODING,
}  # fmt: skip


def files(folder: str) -> list[Path]:
    return [path for path in (ROOT / folder).rglob("*.py") if "_build" not in path.parts]


def code_lines(text: str) -> int:
    """Lines of a Python file that hold code: no blank lines, comments and docstrings."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    lines = {
        line
        for token in tokens
        if token.type not in NO_CODE
        for line in range(token.start[0], token.end[0] + 1)
    }
    for node in ast.walk(ast.parse(text)):
        value = node.value if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            # A docstring, also that of an attribute.
            lines -= set(range(value.lineno, (value.end_lineno or value.lineno) + 1))
    return len(lines)


def test_blank_lines_comments_and_docstrings_are_no_code():
    text = (
        '"""A module."""\n\n# A comment.\nSIZE = 3  # another one\n"""Of an attribute."""\n\n\n'
        'def f(\n    x,\n):\n    """One\n\n    more."""\n    return """a\nb"""\n'
    )
    assert code_lines(text) == 1 + 3 + 2


def test_the_code_is_no_longer_than_its_limit():
    sizes = {
        folder: sum(code_lines(path.read_text(encoding="utf-8")) for path in files(folder))
        for folder in FOLDERS
    }
    total = sum(sizes.values())
    assert total <= MOST_CODE_LINES, (
        f"There are {total:,} lines of code outside of tests ({sizes}), more than "
        f"{MOST_CODE_LINES:,}. The limit keeps the project readable: a newcomer should meet each "
        "idea once. Merge what exists twice, or delete what nobody uses, before you add more; do "
        "not press lines together. The limit goes down, towards 32,500, unless a feature has lines "
        "of its own."
    )


def test_functions_are_short_and_take_few_parameters():
    too_long, too_many = [], []
    for path in (path for folder in FOLDERS for path in files(folder)):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            name = f"{path.relative_to(ROOT)}: {node.name}"
            lines = text.splitlines()[node.lineno - 1 : node.end_lineno]
            if len(lines) > MOST_FUNCTION_LINES:
                count = code_lines(textwrap.dedent("\n".join(lines)))
                too_long += [f"{name} has {count} lines"] * (count > MOST_FUNCTION_LINES)
            taken = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            taken = [argument for argument in taken if argument.arg not in ("self", "cls")]
            is_command = any("command" in ast.unparse(each) for each in node.decorator_list)
            if len(taken) > MOST_PARAMETERS and not is_command:
                too_many.append(f"{name} takes {len(taken)}")
    assert too_long == []
    assert too_many == []
