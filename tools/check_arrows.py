"""Check that imports follow the architecture: what stands left never imports what stands right."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent / "dit_qat"

# Each room and the rooms it may import from, itself apart (docs/architecture.md).
ALLOWED: dict[str, set[str]] = {
    "primitives": set(),
    "kernels": {"primitives"},
    "layers": {"primitives", "kernels"},
    "calibration": {"primitives", "kernels", "layers"},
    "allocation": {"primitives", "kernels", "layers"},
    "export": {"primitives", "kernels", "layers"},
}
ALLOWED["report"] = {*ALLOWED["calibration"], "calibration"}
ALLOWED["dit"] = ALLOWED["llm"] = {*ALLOWED["report"], "allocation", "export", "report"}
ALLOWED["cli"] = {*ALLOWED["dit"], "dit", "llm"}

ROOT_USERS = {"dit", "llm", "cli"}  # for the version

PRIMITIVES_MAY_IMPORT = {"torch", *sys.stdlib_module_names}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of every module that a file imports, lazily or at its top."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")


def violations(root: Path = ROOT) -> list[str]:
    """One line per import against the arrows."""
    found = []
    for path in sorted(root.rglob("*.py")):
        room = path.relative_to(root).parts[0].removesuffix(".py")
        for line, name in imports(path):
            where = f"{path.relative_to(root.parent)}:{line}"
            if name.startswith("."):
                found.append(f"{where} imports {name} relatively; write the full name")
                continue
            top, *rest = name.split(".")
            if top == "dit_qat" and room in ALLOWED:
                # The root package knows every room, so only what stands rightmost may use it.
                target = rest[0] if rest else "the root package"
                if target not in {room, *ALLOWED[room]} and not (room in ROOT_USERS and not rest):
                    found.append(f"{where} ({room}) imports {name}")
            elif room == "primitives" and top not in PRIMITIVES_MAY_IMPORT and top != "dit_qat":
                found.append(f"{where} (primitives) imports {name}: torch and the library only")
    return found


if __name__ == "__main__":
    found = violations()
    print("\n".join(found) or "all imports follow the arrows")
    sys.exit(bool(found))
