"""``seal-extract verify`` and ``export``: one line per file, the exit status of what they found."""

from __future__ import annotations

import argparse

from seal_extract.cli.fail import fail


def run_verify(args: argparse.Namespace) -> int:
    """One line per file and problem; 1 if anything falls short, 2 where there is nothing to look at."""
    from seal_extract.verify import files_for, verify

    files, consumer = files_for(args.folder, args.consumer), args.consumer
    findings = verify(args.folder, consumer)
    for finding in findings:
        print(finding)
    short = {f.path for f in findings if not f.is_warning}
    if short:
        return fail(f"not as {consumer} takes them: {len(short)} of {len(files)} files", 1)
    print(f"as {consumer} takes them: {len(files)} of {len(files)} files")
    return 0


def run_export(args: argparse.Namespace) -> int:
    """One line per features file; 1 if any could not be exported."""
    from seal_extract.export import export

    failed = total = 0
    for exported in export(args.folder, args.layout, args.out, overwrite=args.overwrite):
        total += 1
        if exported.error is None:
            print(exported, flush=True)
        else:
            failed += 1
            fail(str(exported), 1)
    return fail(f"{failed} of {total} files failed", 1) if failed else 0
