"""Compile every kernel for GPUs that are not here: ``python tests/patches/compile_kernels.py 75 90``.

Prints one line a kernel and generation: registers a thread, and bytes a thread that did not fit registers.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from seal_extract.patches import jpeg, jpeg_kernels, kernels

GENERATIONS = tuple(map(int, sys.argv[1:]))
U8, I16, I32, I64 = "*u8", "*i16", "*i32", "*i64"
BLOCK = {"ROWS": kernels.BLOCK[0], "COLUMNS": kernels.BLOCK[1]}
PILLOW, AREA = {"TAPS": 8, "EXACT": False}, {"TAPS": 3, "EXACT": True}
CUT = {"tiles": U8, "slots": I32, "corners": I32, "pixels": I32, "weights": I32}
THREADS = {"LANES": jpeg.THREADS}
JPEG = {"raw": U8, "places": I32, "packed": U8, "bits": I32, "odd": I32, "short": I16, "full": I16}
JPEG |= {"natural": I32, "coefficients": I16, "quantisation": I32, "samples": U8, "pixels": U8}
CASES = [
    (kernels._across, CUT | {"between": U8}, BLOCK | PILLOW),
    (kernels._across, CUT | {"between": I32}, BLOCK | AREA),
    (kernels._down, CUT | {"between": U8, "patches": U8}, BLOCK | PILLOW | {"WIDE": False}),
    (kernels._down, CUT | {"between": I64, "patches": U8}, BLOCK | AREA | {"WIDE": True}),
    (kernels._to_rgb, {"pixels": U8, "tables": I32}, {"LANES": kernels.LANES}),
    (kernels._look_up, {"images": U8, "table": "*fp16", "found": "*fp16"}, {"LANES": kernels.LANES}),
    (jpeg_kernels.unstuff, JPEG, {"CHUNK": 1024}),
    (jpeg_kernels.read_coefficients, JPEG | {"packed": I32}, {"LUMA": 4, "LANES": jpeg.LANES, "STEPS": 64}),
    (jpeg_kernels.columns, JPEG, {"PER_MCU": 6} | THREADS),
    (jpeg_kernels.rows, JPEG, THREADS),
    (jpeg_kernels.colours, JPEG, {"H": 2, "V": 2, "YCBCR": True} | THREADS),
]


def compiled(kernel, pointers, constants, generation):
    """The registers and spilled bytes of a kernel."""
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in names}
    source = ASTSource(kernel, signature, {(names.index(n),): value for n, value in constants.items()})
    cubin = triton.compile(source, target=GPUTarget("cuda", generation, 32)).asm["cubin"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    return map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())


for kernel, pointers, constants in CASES:
    for generation in GENERATIONS:
        registers, spilled = compiled(kernel, pointers, constants, generation)
        print(kernel.__name__, f"sm_{generation}", registers, spilled)
