"""A folder of slides: the good ones are embedded, the bad ones named, a second run goes on where this ended.

Run it: python examples/02_folder.py slides/ seal-conch out
"""

import sys

from seal_extract import ExtractOptions, extract_cohort


def main(folder: str, encoder_name: str, out: str) -> int:
    """Embed every slide of a folder; returns how many failed."""
    options = ExtractOptions(patch_px=224, mpp=0.5, min_tissue=0.5)
    report = extract_cohort(folder, encoder_name, out, options=options)
    for row in report.rows:
        print(f"{row.name}: {row.status}, {row.patches or 0} patches {row.reason}")
    return len(report.failed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) > 0 if len(sys.argv) > 3 else __doc__)
