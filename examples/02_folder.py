"""A folder of slides: the good ones are embedded, the bad ones named, a second run goes on where this ended.

Run it: python examples/02_folder.py slides/ seal-conch out
"""

import sys
from pathlib import Path

from seal_extract import ExtractOptions, SealExtractError, extract, load_encoder


def main(folder: str, encoder_name: str, out: str) -> int:
    """Embed every slide of a folder; returns how many failed."""
    encoder = load_encoder(encoder_name)
    options = ExtractOptions(patch_px=224, mpp=0.5, min_tissue=0.5)
    failed = 0
    for path in sorted(p for p in Path(folder).iterdir() if p.is_file()):
        try:
            result = extract(path, encoder, out, options=options)
        except SealExtractError as exc:
            failed += 1
            print(f"FAILED {exc}")
        else:
            print(f"{path.name}: {len(result.grid)} patches -> {result.path}")
    return failed


if __name__ == "__main__":
    sys.exit(1 if main(*sys.argv[1:]) else 0)
