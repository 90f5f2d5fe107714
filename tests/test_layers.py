"""Imports point down: see `docs/architecture.md` for the picture."""

import ast
from pathlib import Path

LAYERS = (
    ("__init__", "contracts"),
    ("flow", "nn"),
    ("tokenizers", "datasets", "training"),
    ("vlm",),
    ("robot", "sim"),
    ("cli",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
SOURCE = Path(__file__).parents[1] / "src" / "headrace"


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def headrace_imports(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] + [f"{node.module}.{a.name}" for a in node.names if node.module == "headrace"]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        else:
            continue
        found |= {n.split(".")[1] for n in names if n.startswith("headrace.")}
    return found


def test_every_room_has_a_layer():
    assert {room_of(p) for p in SOURCE.rglob("*.py")} <= set(RANK)


def test_imports_point_down():
    upward = []
    for path in SOURCE.rglob("*.py"):
        room = room_of(path)
        for other in headrace_imports(ast.parse(path.read_text())):
            if other in RANK and other != room and RANK[other] >= RANK[room]:
                upward.append(f"{path.relative_to(SOURCE)}: {room} imports headrace.{other}")
    assert not upward, "\n".join(upward)


def test_import_headrace_loads_no_torch():
    import subprocess
    import sys

    code = "import sys, headrace, headrace.contracts, headrace.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=SOURCE.parent).returncode == 0
