"""The rooms of scripts/cai: imports go to earlier rooms only, modules form no circle, commands stay short.

    pytest tests/project/test_rooms.py -s      # prints the arrows between rooms

The order of the rooms and what each is for: references/architecture.md.
"""

import ast
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = ROOT / "scripts"
CAI = SCRIPTS / "cai"

# The rooms that a room may import. Every room is listed after all the rooms that it imports.
ALLOWED = {
    "base": set(),
    "stats": {"base"},
    "data": {"base", "stats"},
    "constitution": {"base", "stats", "data"},
    "models": {"base", "stats", "data", "constitution"},
    "steps": {"base", "stats", "data", "constitution", "models"},
    "train": {"base", "stats", "data", "constitution", "models"},
    "world": {"base", "stats", "constitution"},
    "evaluate": {"base", "stats", "data", "constitution", "models", "steps", "world"},
    "authoring": {"base", "stats", "data", "constitution", "models", "steps", "evaluate"},
    "report": {"base", "stats", "data", "constitution", "models", "evaluate"},
}
MOST_ARROWS = 40
MOST_COMMAND_LINES = 250
MOST_FUNCTION_LINES = 60
# The numbered algorithm of PPO, and a table of options, stay in one piece.
LONG_FUNCTIONS = {("train/ppo.py", "rollout"), ("train/arguments.py", "rl_options")}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def modules() -> list[Path]:
    return sorted(path for path in CAI.rglob("*.py") if path.name != "__init__.py")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(SCRIPTS).with_suffix("").parts)


def imports(tree: ast.Module) -> list[tuple[int, str]]:
    """(line, dotted name) of everything imported from cai or from a command, at the top or inside functions."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return names


def room_of(dotted: str) -> str | None:
    """The room of a dotted name that begins with `cai.`, or None."""
    parts = dotted.split(".")
    return parts[1] if parts[0] == "cai" and len(parts) > 1 else None


@cache
def arrows() -> dict[tuple[str, str], int]:
    """{(room, imported room): how many imports}, without those inside a room."""
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for path in modules():
        room = path.relative_to(CAI).parts[0]
        for _, dotted in imports(parse(path)):
            if (target := room_of(dotted)) and target != room:
                counts[room, target] += 1
    return dict(counts)


def test_every_module_is_in_a_room():
    assert {path.relative_to(CAI).parts[0] for path in modules()} == set(ALLOWED)
    seen: set[str] = set()
    for room, allowed in ALLOWED.items():
        assert allowed <= seen, f"{room} may import a room that comes after it"
        seen.add(room)


def test_imports_go_to_earlier_rooms_only():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {dotted}"
        for path in modules()
        for line, dotted in imports(parse(path))
        if (target := room_of(dotted))
        and target != (room := path.relative_to(CAI).parts[0])
        and target not in ALLOWED[room]
    ]
    assert not wrong, "\n".join(wrong)


def test_the_arrows_between_rooms_are_few():
    table = "\n".join(f"{room:>12} -> {target:<12} {count}" for (room, target), count in sorted(arrows().items()))
    print(f"\n{table}\n{len(arrows())} arrows between rooms")
    assert len(arrows()) <= MOST_ARROWS, table


def test_modules_form_no_circle():
    names = {module_name(path) for path in modules()}
    targets = {
        module_name(path): {
            name for _, dotted in imports(parse(path)) for name in (dotted, dotted.rpartition(".")[0]) if name in names
        }
        for path in modules()
    }
    finished: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name not in finished:
            for target in sorted(targets[name] - {name}):
                visit(target, (*trail, name))
            finished.add(name)

    for name in sorted(targets):
        visit(name, ())


def test_no_module_and_no_command_imports_a_command():
    commands = {path.stem for path in SCRIPTS.glob("*.py")}
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {dotted}"
        for path in [*SCRIPTS.glob("*.py"), *modules()]
        for line, dotted in imports(parse(path))
        if dotted.split(".")[0] in commands
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", sorted(SCRIPTS.glob("*.py")), ids=lambda path: path.stem)
def test_a_command_can_be_read_in_one_sitting(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_COMMAND_LINES


@pytest.mark.parametrize("path", [*sorted(SCRIPTS.glob("*.py")), *modules()], ids=lambda path: path.stem)
def test_functions_are_short(path):
    name = path.relative_to(CAI).as_posix() if CAI in path.parents else path.name
    long = [
        f"{name}:{node.lineno} {node.name} has {length} lines"
        for node in ast.walk(parse(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := node.end_lineno - node.lineno + 1) > MOST_FUNCTION_LINES
        and (name, node.name) not in LONG_FUNCTIONS
    ]
    assert not long, "\n".join(long)


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[1].rglob("test_*.py")), ids=lambda path: path.stem)
def test_every_file_of_tests_has_a_fast_one(path):
    """`pytest -m "not slow"` looks at every module."""
    tests = [node for node in parse(path).body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    marks = [[ast.unparse(decorator) for decorator in test.decorator_list] for test in tests]
    assert any("pytest.mark.slow" not in names for names in marks), f"{path.name} has slow tests only"
