"""Print the lowest versions that pyproject.toml allows as constraints for pip: h5py>=3.11 as h5py==3.11.*."""

import re
from pathlib import Path

try:
    import tomllib
except ImportError:
    import tomli as tomllib

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
wanted = [*project["dependencies"]]
for extra in ("dev", "czi", "robustness", "search", "train", "view"):  # what the tests install
    wanted += project["optional-dependencies"][extra]
floors = {re.sub(r">=([\d.]+)", r"==\1.*", line) for line in wanted if ">=" in line}
print("\n".join(sorted(floors)))
