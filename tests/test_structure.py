"""The shape of the house: who may import whom, what is public, how fast it answers, how long a file is."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib.metadata import version
from pathlib import Path
from textwrap import dedent

import pytest

import seal_extract
from seal_extract import errors

PACKAGE = Path(__file__).parents[1] / "seal_extract"

# the floors of the house, from the ground up; a room may import only rooms on lower floors
FLOORS = [
    {"errors", "names", "publish", "hdf5", "plugins"},
    {"slides"},
    {"tissue"},
    {"patches"},
    {"encoders"},
    {"features"},
    {"run", "genes"},
    {"pooling", "train"},
    {"volume"},
    {"evaluate"},
    {"view"},
    {"demo"},
    {"bench", "doctor"},
    {"cli"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"
}


def imported(path):
    """Modules of this package that a file imports anywhere in it: at the top, in functions, for types."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "seal_extract":
            module = node.module.removeprefix("seal_extract").removeprefix(".")
            inside = {f"{module}.{alias.name}".removeprefix(".") for alias in node.names} & set(MODULES)
            names |= inside or {module}
        elif isinstance(node, ast.Import):
            names |= {a.name.removeprefix("seal_extract.") for a in node.names if "seal_extract." in a.name}
    return names


ARROWS = {module: imported(path) for module, path in MODULES.items()}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_to_lower_floors(module):
    room = module.split(".")[0]
    for other in ARROWS[module]:
        below = other.split(".")[0]
        assert below == room or FLOOR_OF[below] <= FLOOR_OF[room] - (room not in FLOORS[0]), (module, other)
        assert not (room == "encoders" and below in ("slides", "tissue")), "encoders know nothing of slides"


def test_no_imports_go_in_a_circle():
    TopologicalSorter(ARROWS).prepare()  # raises and names the circle


def test_the_first_room_holds_few_files():
    files = {path.name for path in PACKAGE.glob("*.py")}
    assert files == {
        "__init__.py", "errors.py", "names.py", "publish.py", "hdf5.py", "plugins.py", "doctor.py", "demo.py"
    }  # fmt: skip


@pytest.mark.parametrize("module", MODULES)
def test_files_are_short_enough_to_read(module):
    assert len(MODULES[module].read_text().splitlines()) <= 400


def test_commands_print_through_one_function():
    """`echo`, which lets no name of a file move the cursor; events are JSON."""
    printing = [p.name for p in (PACKAGE / "cli").glob("*.py") if re.search(r"\bprint\(", p.read_text())]
    assert sorted(printing) == ["terminal.py"]


def test_no_text_names_an_install_that_cannot_work():
    """The package is on no index: it and its extras are installed from a clone."""
    root = PACKAGE.parent
    texts = [p for p in PACKAGE.rglob("*") if p.suffix in (".py", ".html", ".js")]
    for path in [
        *texts,
        *root.glob("examples/*.py"),
        *root.glob("weights/**/*.md"),
        *root.glob("*/README.md"),
        root / "README.md",
    ]:
        for command in re.findall(r"pip install [^\n`&;#]*", path.read_text(encoding="utf-8")):
            assert not re.search(r"seal[-_]extract\b", command), (path.name, command)


def test_the_version_is_the_installed_one():
    assert seal_extract.__version__ == version("seal-extract")
    assert "__version__" in dir(seal_extract)


def test_reading_never_imports_torch():
    rooms = ("slides", "tissue", "patches.grid")
    modules = ", ".join(f"seal_extract.{name}" for name in MODULES if name.startswith(rooms))
    run(f"import sys, {modules}; assert 'torch' not in sys.modules")


def test_the_command_line_and_the_encoder_table_answer_without_torch_or_numpy():
    run("""
        import sys, seal_extract.cli, seal_extract.encoders
        assert not {"torch", "timm", "numpy", "huggingface_hub"} & set(sys.modules)
    """)


def test_a_finished_cohort_is_recognised_without_what_is_slow_to_import():
    run("""
        import importlib.metadata, sys
        importlib.metadata.version = None  # not asked for: on a machine with a GPU, zarr may not be installed
        import seal_extract.run.cohort, seal_extract.encoders.request, seal_extract.view.cohort_report
        assert not {"torch", "timm", "cv2", "tiffslide", "zarr"} & set(sys.modules)
    """)


def run(code):
    done = subprocess.run([sys.executable, "-c", dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there_and_documented():
    assert set(seal_extract.__all__) == set(seal_extract._HOME)
    for name in seal_extract.__all__:
        assert getattr(seal_extract, name).__doc__, name


def test_the_error_tree_in_the_docstring_is_the_real_one():
    drawn = {word for word in errors.__doc__.split() if word.endswith("Error")} - {"OSError"}
    real = {
        n for n, v in vars(errors).items() if isinstance(v, type) and issubclass(v, errors.SealExtractError)
    }
    assert drawn == real
