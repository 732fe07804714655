"""The picture of the rooms as a test: which room may import which, and what is done in one place only.

Nothing is imported here: the sources are read.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

PACKAGE = Path(__file__).resolve().parent.parent / "asynccb"

# ---------------------------------------------------------------- the picture
#
#     cli          orchestrator ── admission            guests: the command line, many runs
#      |             |
#     trainer ── run ── session ── supervisor, driver   owns one training, its tasks, its thread, its end
#      |          |        |
#     models   engines    bus ─────────┐                who drives · who delivers
#      |          |        |           |
#      |          |     training    callbacks/*         what happens on the training thread · who reacts
#      |          |        |           |
#      └──────────┼────────┼────── storage              atomic files, HDF5
#                 |        |           |
#         protocols · events · errors · text · signatures    the ground floor
#
# A line for each room, from bottom to top: what it may import besides itself. `a.b` is one module of a room.

GROUND = ["errors", "events", "protocols", "signatures", "text"]
PARTS = [*GROUND, "storage", "callbacks", "training", "bus", "engines"]

MAY_IMPORT: dict[str, list[str]] = {
    # the ground floor
    "errors": [],
    "signatures": [],
    "text": ["errors"],
    "events": ["errors"],
    "protocols": ["errors", "events"],
    # rooms that know nothing of a run
    "storage": GROUND,
    "models": [*GROUND, "storage"],
    "callbacks": [*GROUND, "storage"],
    "budget": GROUND,
    "health": GROUND,
    # one training, in parts
    "training": [*GROUND, "callbacks.base"],
    "bus": [*GROUND, "callbacks.base", "callbacks.hooks", "training.control"],
    "engines": GROUND,
    # one training, as a whole
    "claims": GROUND,
    "statistics": [*GROUND, "bus", "budget", "health"],
    "failures": [*GROUND, "bus", "callbacks"],
    "ending": [*GROUND, "training.control"],
    "unit": [*GROUND, "callbacks.base", "storage", "training", "bus"],
    "resume": [*GROUND, "callbacks.history", "storage", "budget", "training", "bus", "unit"],
    "driver": [*GROUND, "training", "bus", "ending", "statistics", "unit", "resume"],
    "supervisor": [*GROUND, "bus", "claims", "ending", "driver"],
    "wiring": [*PARTS, "health", "statistics", "failures", "ending", "resume", "driver", "supervisor"],
    "session": [*PARTS, "budget", "claims", "ending", "resume", "driver", "wiring"],
    "awaited": [*GROUND, "ending"],
    "run": [*PARTS, "awaited", "budget", "statistics", "claims", "ending", "resume", "session", "wiring"],
    "prepared": [*GROUND, "callbacks", "training.arguments"],
    "trainer": [*PARTS, "models", "claims", "ending", "resume", "session", "run", "prepared"],
    # many of them
    "all_events": [*GROUND, "bus.readers", "wiring"],
    "admission": GROUND,
    "completed": GROUND,
    "overview": [*GROUND, "callbacks"],
    "orchestrator": [
        *PARTS,
        "budget",
        "health",
        "claims",
        "statistics",
        "ending",
        "wiring",
        "run",
        "prepared",
        "trainer",
        "all_events",
        "admission",
        "completed",
        "overview",
    ],
    # doubles for tests of users, and the guests
    "integrations": [*PARTS, "models", "claims", "ending", "driver", "session", "run", "prepared"],
    "testing": [*PARTS, "run", "trainer"],
    "cli": [*PARTS, "models", "run", "trainer"],
    "__main__": ["cli"],
}

# Imports inside functions point the same way. What stands here is let through, with its reason.
LAZY_EXCEPTIONS: dict[tuple[str, str], str] = {}

FRAMEWORKS = {"flax", "jax", "keras", "sklearn", "tensorflow", "torch"}
LAZY = {"PIL", "aiohttp", "h5py", "pandas", "rich", "tensorboardX"}


# ---------------------------------------------------------------- reading the sources


class Import(NamedTuple):
    """One imported module, and where. ``lazy``: inside a function, so that it happens at the call."""

    name: str
    line: int
    lazy: bool


class Module(NamedTuple):
    name: str
    path: Path
    tree: ast.Module

    @property
    def room(self) -> str:
        return self.name.partition(".")[0]


def _imports(tree: ast.AST, lazy: bool = False) -> Iterator[Import]:
    """Every import that happens at run time; what is under TYPE_CHECKING never does."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            # Whether `name` is a module of `module` or something in it is settled by _resolve.
            yield from (Import(f"{node.module}.{alias.name}", node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for branch in node.orelse:
                yield from _imports(ast.Module([branch], []), lazy)
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            yield from _imports(node, lazy or inside)


def _name(path: Path, package: Path) -> str:
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def _modules(package: Path) -> list[Module]:
    return [
        Module(_name(path, package), path, ast.parse(path.read_text(encoding="utf-8"), str(path)))
        for path in sorted(package.rglob("*.py"))
    ]


MODULES = _modules(PACKAGE)
NAMES = {module.name for module in MODULES}


def _resolve(imported: str, names: set[str]) -> str | None:
    """The module of ours that ``imported`` loads; ``__init__``: the package itself; None: not ours."""
    top, _, rest = imported.partition(".")
    if top != "asynccb":
        return None
    while rest and rest not in names:
        rest = rest.rpartition(".")[0]
    return rest or "__init__"


def _allowed(target: str, room: str) -> bool:
    return any(target == may or target.startswith(f"{may}.") for may in [room, *MAY_IMPORT.get(room, [])])


def _rings(arrows: Mapping[str, set[str]]) -> list[set[str]]:
    """The sets of modules that reach each other."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            new = arrows.get(todo.pop(), set()) - seen
            seen |= new
            todo += new
        return seen

    reach = {name: reached(name) for name in arrows}
    rings = [frozenset(b for b in reach[a] if a in reach[b]) for a in arrows if a in reach[a]]
    return [set(ring) for ring in dict.fromkeys(rings)]


def _arrows(modules: list[Module]) -> dict[str, set[str]]:
    """What each module loads when it is imported: ``a.b`` loads ``a`` first, for whoever is not in ``a``."""
    names = {module.name for module in modules}
    arrows: dict[str, set[str]] = {}
    for module in modules:
        targets = {_resolve(found.name, names) for found in _imports(module.tree) if not found.lazy}
        parents = {target.rpartition(".")[0] for target in targets if target and "." in target}
        outer = {
            parent for parent in parents if parent in names and not f"{module.name}.".startswith(f"{parent}.")
        }
        arrows[module.name] = {target for target in targets | outer if target}
    return arrows


def _found(say: Callable[[Module, ast.AST], str | None], *, but: tuple[str, ...] = ()) -> list[str]:
    """One line for each node of which ``say`` has something to say, in all rooms but ``but``."""
    return [
        f"{module.path.relative_to(PACKAGE.parent)}:{getattr(node, 'lineno', 0)} {said}"
        for module in MODULES
        if module.room not in but
        for node in ast.walk(module.tree)
        if (said := say(module, node))
    ]


# ---------------------------------------------------------------- the arrows


@pytest.mark.parametrize("lazy", [False, True], ids=["at module level", "inside functions"])
def test_arrows_only_go_down(lazy: bool) -> None:
    wrong = [
        f"asynccb/{module.path.relative_to(PACKAGE)}:{found.line} imports {target}"
        for module in MODULES
        if module.name != "__init__"
        for found in _imports(module.tree)
        if found.lazy is lazy
        and (target := _resolve(found.name, NAMES)) is not None
        and not _allowed(target, module.room)
        and (module.name, target) not in LAZY_EXCEPTIONS
    ]
    assert wrong == []


def test_every_room_has_its_line_in_the_table() -> None:
    assert {module.room for module in MODULES} - {"__init__"} <= set(MAY_IMPORT)


def test_the_table_has_no_ring_itself() -> None:
    assert (
        _rings({room: {may.partition(".")[0] for may in below} for room, below in MAY_IMPORT.items()}) == []
    )


def test_no_import_ring_at_module_level() -> None:
    assert _rings(_arrows(MODULES)) == []


def test_nobody_imports_the_command_line_or_the_package_itself() -> None:
    wrong = [
        f"asynccb/{module.path.relative_to(PACKAGE)}:{found.line} imports {target}"
        for module in MODULES
        for found in _imports(module.tree)
        if (target := _resolve(found.name, NAMES)) in {"cli", "__main__", "__init__"}
        and (module.name, target) != ("__main__", "cli")
    ]
    assert wrong == []


# ---------------------------------------------------------------- what is done in one place only


def _importers(wanted: set[str], *, lazy_too: bool) -> set[str]:
    return {
        module.name
        for module in MODULES
        for found in _imports(module.tree)
        if found.name.partition(".")[0] in wanted and (lazy_too or not found.lazy)
    }


def test_only_storage_touches_h5py() -> None:
    assert {name for name in _importers({"h5py"}, lazy_too=True) if not name.startswith("storage")} == set()


def test_only_the_command_line_touches_signals() -> None:
    assert _importers({"signal"}, lazy_too=True) <= {"cli", "__main__"}


def test_frameworks_and_slow_libraries_are_imported_at_first_use() -> None:
    found = _importers(FRAMEWORKS | LAZY, lazy_too=False)
    # An integration with a framework is imported by who has the framework imported already.
    assert {name for name in found if not name.startswith("integrations.")} == set()


def test_only_callbacks_and_the_command_line_print() -> None:
    def prints(module: Module, node: ast.AST) -> str | None:
        return "print" if isinstance(node, ast.Call) and ast.unparse(node.func) == "print" else None

    assert _found(prints, but=("callbacks", "cli")) == []


def test_nothing_runs_in_the_loops_default_executor() -> None:
    def borrows(module: Module, node: ast.AST) -> str | None:
        if not isinstance(node, ast.Call):
            return None
        called = ast.unparse(node.func)
        to_default = called.endswith("run_in_executor") and ast.unparse(node.args[0]) == "None"
        return called if to_default or called.endswith("to_thread") else None

    assert _found(borrows) == []


def test_every_queue_has_a_bound() -> None:
    unbounded = {"Queue", "LifoQueue", "PriorityQueue"}

    def endless(module: Module, node: ast.AST) -> str | None:
        if not isinstance(node, ast.Call):
            return None
        called = ast.unparse(node.func)
        last = called.rpartition(".")[2].partition("[")[0]
        return (
            called if last == "SimpleQueue" or (last in unbounded and not node.args + node.keywords) else None
        )

    assert _found(endless) == []


def test_no_module_logs_under_another_name() -> None:
    def strays(module: Module, node: ast.AST) -> str | None:
        if not (isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("getLogger", "basicConfig"))):
            return None
        given = ast.unparse(node.args[0]) if node.args else ""
        return None if given == "__name__" or given.startswith("'asynccb") else ast.unparse(node)

    assert _found(strays) == []


# ---------------------------------------------------------------- negative controls


def _written(folder: Path, **sources: str) -> list[Module]:
    for name, source in sources.items():
        path = folder / (name.replace("__dot__", "/") + ".py")
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
    return _modules(folder)


def test_the_reader_tells_module_level_from_functions_and_type_checking(tmp_path: Path) -> None:
    source = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import never
else:
    import at_run_time
try:
    import tried
except ImportError:
    pass
class A:
    import in_a_class
    def f(self):
        from a import b
        if TYPE_CHECKING:
            import never_either
"""
    (module,) = _written(tmp_path, sample=source)
    found = {(item.name, item.lazy) for item in _imports(module.tree)}
    assert found == {
        ("typing.TYPE_CHECKING", False),
        ("at_run_time", False),
        ("tried", False),
        ("in_a_class", False),
        ("a.b", True),
    }


def test_a_ring_is_found_even_through_a_package(tmp_path: Path) -> None:
    modules = _written(
        tmp_path,
        low="import asynccb.room.inner",
        room__dot____init__="from asynccb.high import x",
        room__dot__inner="",
        high="def f():\n    import asynccb.top\nfrom asynccb import low",
        top="import asynccb.high",
    )
    assert _rings(_arrows(modules)) == [{"low", "room", "high"}]


def test_an_arrow_that_goes_up_is_refused() -> None:
    assert not _allowed("trainer", "callbacks")
    assert not _allowed("callbacks.csv_logger", "training")
    assert _allowed("callbacks.base", "training")
    assert _allowed("storage.atomic", "callbacks")
    assert _resolve("asynccb.errors.ArgumentError", {"errors"}) == "errors"
    assert _resolve("asynccb.Trainer", {"errors"}) == "__init__"
    assert _resolve("asynchronous", {"errors"}) is None
