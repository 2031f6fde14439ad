"""The shape of the house: who may import whom, what is public, how fast it answers, how long a file is."""

import ast
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from textwrap import dedent

import pytest

import seal_extract
from seal_extract import errors

PACKAGE = Path(__file__).parents[1] / "seal_extract"

# each part may import itself and the parts named; imports inside functions and for types count too
READING = {
    "errors",
    "publish",
    "tiff",
    "tiff_pixels",
    "images",
    "hest",
    "readers",
    "slide",
    "slide_files",
    "slide_list",
    "folders",
    "slide_mpp",
    "names",
    "remote",
    "overview",
    "evidence",
    "geojson",
    "tissue",
    "grid",
    "hdf5",
    "patch_files",
}
ALLOWED = {
    "reading": set(),
    "pixels": {"errors"},
    "patches": {"reading", "pixels"},
    "encoders": {"errors", "publish", "pixels"},
    "genes": {"errors", "encoders", "publish", "reading", "results"},
    "results": {"reading", "encoders"},
    "slide_level": {"reading", "encoders", "results"},
    "story": {"reading", "pixels", "patches", "encoders", "results", "view"},
    "train": {"reading", "pixels", "patches", "encoders", "genes"},
    "view": {"reading", "results", "publish", "genes"},
    "synthetic": {"errors", "publish"},
    "demo": {"synthetic", "encoders", "errors", "publish"},
    "doctor": {"encoders", "patches", "results", "reading", "demo"},
    "bench": {"story", "results", "patches", "reading", "encoders", "synthetic"},
    "evaluate": {"errors", "publish", "reading", "encoders", "genes", "train"},
    "cli": {
        "bench",
        "doctor",
        "evaluate",
        "reading",
        "encoders",
        "genes",
        "train",
        "results",
        "slide_level",
        "story",
        "view",
        "demo",
    },
}
PARTS = {
    **dict.fromkeys(READING, "reading"),
    "resample": "pixels",
    "decode": "patches",
    "batches": "patches",
    "encoders": "encoders",
    "genes": "genes",
    "train": "train",
    "store": "results",
    "layouts": "results",
    "export": "results",
    "scverse": "results",
    "origin": "results",
    "consumers": "results",
    "verify": "results",
    "plan": "results",
    "planner": "results",
    "provenance": "results",
    "finished": "results",
    "results": "results",
    "status": "results",
    "slide_level": "slide_level",
    "extract": "story",
    "embed_patches": "story",
    "forward": "story",
    "planned": "story",
    "writer": "story",
    "cohort": "story",
    "staging": "story",
    "ray_engine": "story",
    "view": "view",
    "synthetic": "synthetic",
    "demo": "demo",
    "doctor": "doctor",
    "bench": "bench",
    "evaluate": "evaluate",
    "cli": "cli",
}


def sources():
    return sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def home(path):
    """The top-level name a file belongs to: decode/regions.py -> decode."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imported(path):
    """Top-level modules of this package that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("seal_extract"):
            below = node.module.split(".")[1:]
            names |= {below[0]} if below else {alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    part = PARTS[home(path)]
    for name in imported(path):
        other = PARTS[name]
        assert other == part or {other, name} & ALLOWED[part], (
            f"{path.name} ({part}) imports {name} ({other})"
        )


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_are_short_enough_to_read(path):
    assert len(path.read_text().splitlines()) <= 380


def test_commands_print_through_one_function():
    """`say`, which lets no name of a file move the cursor; events are JSON."""
    printing = [p.name for p in (PACKAGE / "cli").glob("*.py") if re.search(r"\bprint\(", p.read_text())]
    assert sorted(printing) == ["events.py", "fail.py"]


def test_no_text_names_an_install_that_cannot_work():
    """The package is on no index: it and its extras are installed from a clone."""
    root = PACKAGE.parent
    texts = [p for p in PACKAGE.rglob("*") if p.suffix in (".py", ".html", ".js")]
    for path in [*texts, *root.glob("examples/*.py"), *root.glob("weights/**/*.md"), root / "README.md"]:
        for command in re.findall(r"pip install [^\n`&;#]*", path.read_text(encoding="utf-8")):
            assert not re.search(r"seal[-_]extract\b", command), (path.name, command)


def test_the_version_is_the_installed_one():
    assert seal_extract.__version__ == version("seal-extract")
    assert "__version__" in dir(seal_extract)


def test_reading_never_imports_torch():
    modules = ", ".join(
        f"seal_extract.{name}" for name in sorted(READING) if (PACKAGE / f"{name}.py").exists()
    )
    run(f"import sys, {modules}; assert 'torch' not in sys.modules")


def test_the_command_line_and_the_encoder_table_answer_without_torch_or_numpy():
    run("""
        import sys, seal_extract.cli, seal_extract.encoders
        assert not {"torch", "timm", "numpy"} & set(sys.modules)
    """)


def test_a_finished_cohort_is_recognised_without_what_is_slow_to_import():
    run("""
        import sys, seal_extract.cohort, seal_extract.encoders.request, seal_extract.view.cohort_report
        assert not {"torch", "timm", "cv2", "tiffslide", "zarr"} & set(sys.modules)
    """)


def run(code):
    done = subprocess.run([sys.executable, "-c", dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there_and_documented():
    assert set(seal_extract.__all__) == set(seal_extract._HOME)
    for name in seal_extract.__all__:
        assert getattr(seal_extract, name).__doc__, name


def test_the_function_extract_is_not_hidden_by_its_module():
    for first in (
        "import seal_extract.extract",
        "from seal_extract.extract import extract",
        "import seal_extract",
    ):
        run(f"{first}; from seal_extract import extract; assert callable(extract)")


def test_the_error_tree_in_the_docstring_is_the_real_one():
    drawn = {word for word in errors.__doc__.split() if word.endswith("Error")} - {"OSError"}
    real = {
        n for n, v in vars(errors).items() if isinstance(v, type) and issubclass(v, errors.SealExtractError)
    }
    assert drawn == real
