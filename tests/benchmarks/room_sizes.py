"""Files, lines and comments of every room, and the length of functions: `python tests/benchmarks/room_sizes.py`."""

from __future__ import annotations

import ast
import io
import statistics
import tokenize
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]


def room_of(path: Path) -> str:
    """`labn/<room>`, or the first part of the path.

    Example:
        >>> room_of(Path("labn/lrp/rules.py")), room_of(Path("cli.py"))
        ('labn/lrp', 'cli.py')
    """
    return "/".join(path.parts[:2]) if path.parts[0] == "labn" and len(path.parts) > 2 else path.parts[0]


def comments(source: str) -> int:
    """Number of comments, without docstrings."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return sum(token.type == tokenize.COMMENT for token in tokens)


def function_lengths(source: str) -> list[int]:
    """Lines of every function without its docstring."""
    functions = (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    return [f.end_lineno - f.lineno + 1 - len((ast.get_docstring(f, False) or "").splitlines()) for f in functions]


def main() -> None:
    """Print the table of rooms."""
    rooms: defaultdict[str, list[str]] = defaultdict(list)
    for top in ("cli.py", "labn", "callbacks", "datamodules"):
        for path in sorted((ROOT / top).rglob("*.py")) or [ROOT / top]:
            rooms[room_of(path.relative_to(ROOT))].append(path.read_text())
    print("| room | files | lines | comments |\n|---|---|---|---|")
    for room, sources in rooms.items():
        whole = "\n".join(sources)
        lines = len(whole.splitlines())
        print(f"| `{room}` | {len(sources)} | {lines} | {sum(map(comments, sources)) / lines:.1%} |")
    lengths = [length for sources in rooms.values() for s in sources for length in function_lengths(s)]
    print(f"Functions: median {statistics.median(lengths):.0f} lines, longest {max(lengths)}.")


if __name__ == "__main__":
    main()
