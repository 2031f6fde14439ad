"""Print the size of the package: ``python tests/size_of_house.py [CHECKOUT] [SLIDE]``.

With a slide, also the package's files, functions and classes that are used while ``seal-extract`` embeds it.
"""

import ast
import sys
import tempfile
import threading
from pathlib import Path


def lines(paths):
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def arrows(package):
    """Pairs of rooms of which one imports the other."""
    pairs = set()
    for path in package.rglob("*.py"):
        room = path.relative_to(package).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("seal_extract"):
                below = node.module.split(".")[1:2] or [alias.name for alias in node.names]
                pairs |= {(room, other) for other in below if other != room and room != "__init__"}
    return pairs


def used(package, slide):
    """Files and functions of the package that run while a slide is embedded, all in one process."""
    calls = set()

    def record(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(str(package)):
            calls.add((frame.f_code.co_filename, frame.f_code.co_qualname))

    from seal_extract.cli import main

    threading.setprofile(record)
    sys.setprofile(record)
    with tempfile.TemporaryDirectory() as out:
        main([slide, "-o", out, "--plan-timeout", "0", "--quiet"])
    sys.setprofile(None)
    functions = {call for call in calls if not call[1].startswith("<")}
    return len({file for file, _ in functions}), len(functions)


root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1]).resolve()
package = root / "seal_extract"
files = sorted(package.rglob("*.py"))
print(f"Python lines in the package   {lines(files)}")
print(f"Python files in the package   {len(files)}")
print(f"files in its first room       {len(list(package.glob('*.py')))}")
print(f"arrows between rooms          {len(arrows(package))}")
print(f"test lines                    {lines((root / 'tests').rglob('*.py'))}")
print(f"words of the README           {len((root / 'README.md').read_text(encoding='utf-8').split())}")
if len(sys.argv) > 2:
    sys.path.insert(0, str(root))
    print("files, functions of one slide {}, {}".format(*used(package, sys.argv[2])))
