"""The kernels that the sources launch, found without running them."""

import ast
from collections.abc import Iterator
from pathlib import Path

KERNELS = Path(__file__).parents[2] / "kernels"


def calls(path: Path) -> Iterator[ast.Call]:
    """The calls in a file."""
    return (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))


def launched(folder: Path = KERNELS) -> set[str]:
    """The kernels that the sources in a folder launch through launch()."""
    names = set()
    for path in folder.rglob("*.py"):
        for call in calls(path):
            if isinstance(call.func, ast.Name) and call.func.id == "launch":
                kernel = call.args[0]
                names.add(kernel.attr if isinstance(kernel, ast.Attribute) else ast.unparse(kernel))
    return names


def launched_directly(folder: Path = KERNELS) -> set[str]:
    """The kernels that they launch as kernel[grid](...), of which no table can know."""
    return {
        ast.unparse(call.func.value)
        for path in folder.rglob("*.py")
        if path.name != "launch.py"
        for call in calls(path)
        if isinstance(call.func, ast.Subscript)
    }
