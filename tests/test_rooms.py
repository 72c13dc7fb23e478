"""A room of the code imports only rooms that stand below it, in the order that CONTRIBUTING.md shows."""

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
MODULES = {
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): path
    for area in ("train", "launch")
    for path in (REPOSITORY / area).rglob("*.py")
}
PACKAGES = {"train", "launch"}  # which make libraries quiet before they are imported, and nothing else
APART = ("train.demo",)  # stands beside the rooms: the toy world, which uses the commands


def rooms() -> list[list[str]]:
    """From the roof down, the rooms that stand on one level together."""
    text = (REPOSITORY / "CONTRIBUTING.md").read_text()
    (listed,) = re.findall(r"```rooms\n([\s\S]*?)```", text)
    levels: list[list[str]] = []
    for line in listed.splitlines():
        names, about = line[:44].split(), line[44:].strip()
        if about:
            levels.append(names)
        else:  # continues the level above
            levels[-1] += names
    return levels


def room_of(module: str, known: set[str]) -> str:
    """The room that a module is in: its own file, or the nearest directory that is one."""
    path = module.replace(".", "/")
    if f"{path}.py" in known:
        return f"{path}.py"
    while f"{path}/" not in known and "/" in path:
        path = path.rpartition("/")[0]
    return f"{path}/"


def imports(path: Path) -> set[str]:
    """The modules of ours that a module imports, wherever it does."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            whole = (f"{node.module}.{alias.name}" for alias in node.names)
            found |= {name if name in MODULES else str(node.module) for name in whole}
    return found & MODULES.keys()


def test_a_room_imports_only_rooms_below_it():
    levels = rooms()
    level = {room: number for number, names in enumerate(levels) for room in names}
    upwards = []
    for module, path in MODULES.items():
        if module.startswith(APART) or module in PACKAGES:
            continue
        own = room_of(module, level.keys())
        assert own in level, f"{module} is in no room that CONTRIBUTING.md lists"
        for other in imports(path) - PACKAGES:
            room = room_of(other, level.keys())
            if room != own and not (room in level and level[room] > level[own]):
                upwards.append(f"{module} ({own}) imports {other} ({room})")
    assert not upwards, "\n".join(upwards)


@pytest.mark.parametrize("names", rooms(), ids=" ".join)
def test_every_room_that_is_listed_exists(names):
    for name in names:
        assert (REPOSITORY / name).exists(), name
