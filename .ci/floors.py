"""Print the lowest versions that pyproject.toml allows as constraints for pip: h5py>=3.11 as h5py==3.11.*."""

import re
from pathlib import Path

try:
    import tomllib
except ImportError:
    import tomli as tomllib

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
wanted = [*project["dependencies"]]
for extra in project["optional-dependencies"].values():
    wanted += extra
floors = {m[1]: m[2] for line in wanted if (m := re.match(r"([\w.-]+)>=([\d.]+)", line))}
print("\n".join(f"{name}=={version}.*" for name, version in sorted(floors.items())))
