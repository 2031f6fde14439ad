"""Fetch the wheels that the acceptance run needs and its machine lacks: about 25 MB.

``python tests/gpu_acceptance/carry.py FOLDER [--python 3.12]``
"""

import argparse
import re
import subprocess
import sys
import zipfile
from pathlib import Path

WHEELS = ["imagecodecs", "msgspec", "openslide-bin", "openslide-python", "shapely", "simplejpeg", "tifffile"]
WHEELS += ["tiffslide", "nvidia-nvimgcodec-cu13", "nvidia-nvjpeg", "nvidia-nvjpeg2k-cu13"]
GLIBC = ("2_28", "2_27", "2_24", "2_17", "2_5")
CODECS = ("imcd", "jpeg8", "jpeg2k", "png", "shared", "shared_cython", "zlib")  # of the fifty of imagecodecs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12")
    args = parser.parse_args()
    platforms = [f"--platform=manylinux_{version}_x86_64" for version in GLIBC]
    platforms += [f"--platform=manylinux{year}_x86_64" for year in ("2014", "1")]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        *platforms,
    ]
    command += [f"--python-version={args.python}", "--implementation=cp", "--dest", str(args.folder), *WHEELS]
    subprocess.run(command, check=True)
    for wheel in args.folder.glob("imagecodecs-*.whl"):
        shrink(wheel)
    for wheel in args.folder.glob("nvidia_nvimgcodec*.whl"):
        others = rf"(opencv|tiff)_ext|cpython-(?!{args.python.replace('.', '')}-)"
        rewrite(wheel, lambda name, others=others: not re.search(others, name))
    size = sum(wheel.stat().st_size for wheel in args.folder.glob("*.whl"))
    print(f"{args.folder}: {size / 2**20:.0f} MiB")


def shrink(wheel: Path) -> None:
    """Leave out the codecs that slides do not use, and the libraries that no other codec needs."""

    def is_codec(name: str) -> bool:
        return re.fullmatch(r"imagecodecs/_\w+\.\S*so", name) is not None

    with zipfile.ZipFile(wheel) as made:
        names = made.namelist()
        kept = {n for n in names if is_codec(n) and Path(n).name.split(".")[0][1:] in CODECS}
        libraries = {n for n in names if n.startswith("imagecodecs.libs/")}
        while True:  # the name of a library stands in what is linked with it
            code = b"".join(made.read(name) for name in kept)
            more = {name for name in libraries - kept if Path(name).name.encode() in code}
            if not more:
                break
            kept |= more
    rewrite(wheel, lambda name: name in kept or not (is_codec(name) or name in libraries))


def rewrite(wheel: Path, is_kept) -> None:
    """Write a wheel again with some of its files."""
    part = wheel.with_suffix(".part")
    with (
        zipfile.ZipFile(wheel) as old,
        zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as new,
    ):
        for entry in filter(is_kept, old.namelist()):
            new.writestr(entry, old.read(entry))
    part.replace(wheel)


if __name__ == "__main__":
    main()
