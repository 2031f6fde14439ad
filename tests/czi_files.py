"""CZI files by pylibCZIrw, and what it does not write: JPEG XR, and the part of CZI that OpenSlide reads."""

import struct

import imagecodecs
import numpy as np
from pylibCZIrw import czi

BLOCK_PX = 256
BGR_24 = bytes.fromhex("24c3dd6f034efe4bb1853d77768dc90c")  # the pixel format in the header of a JPEG XR
JPEG_XR = 4  # the number of the compression
ATTACHMENTS_AT = 104  # where the header has the place of the directory of attachments


def write_czi(path, scenes, mpp=0.5, compression="zstd0:ExplicitLevel=1"):
    """Write (x, y, pixels [H, W, C]) of each scene in blocks of `BLOCK_PX`."""
    with czi.create_czi(str(path), compression_options=compression) as file:
        for scene, (x0, y0, pixels) in enumerate(scenes):
            for y in range(0, pixels.shape[0], BLOCK_PX):
                for x in range(0, pixels.shape[1], BLOCK_PX):
                    block = np.ascontiguousarray(pixels[y : y + BLOCK_PX, x : x + BLOCK_PX, ::-1])
                    file.write(block, location=(x0 + x, y0 + y), scene=scene)
        file.write_metadata("slide", scale_x=mpp * 1e-6, scale_y=mpp * 1e-6)
    return path


def to_jpeg_xr(path):
    """Compress the blocks of an uncompressed file in their places, without losses."""
    data = bytearray(path.read_bytes())
    for entry, block in _entries(data):
        struct.pack_into("<i", data, entry + 18, JPEG_XR)
        if block is not None:  # the entry beside its pixels, and not the one in the directory
            metadata_bytes, _, count = struct.unpack_from("<iiq", data, block)
            width, height = (struct.unpack_from("<i", data, entry + 40 + 20 * i)[0] for i in (0, 1))
            first = block + max(256, 16 + _entry_bytes(data, entry)) + metadata_bytes
            pixels = np.frombuffer(data, np.uint8, count, first).reshape(height, width, 3)
            coded = imagecodecs.jpegxr_encode(np.ascontiguousarray(pixels[..., ::-1]), level=1.0)
            coded = coded.replace(BGR_24[:15] + b"\x0d", BGR_24, 1)
            data[first : first + len(coded)] = coded
            struct.pack_into("<q", data, block + 8, len(coded))
    path.write_bytes(data)
    return path


def for_openslide(path):
    """Rename the dimensions that OpenSlide does not know, and add an empty directory of attachments."""
    data = bytearray(path.read_bytes())
    for entry, _ in _entries(data):
        for at in range(entry + 32, entry + _entry_bytes(data, entry), 20):
            if data[at : at + 1] in (b"Z", b"T"):
                data[at : at + 1] = b"M"
    struct.pack_into("<q", data, ATTACHMENTS_AT, len(data))
    path.write_bytes(data + b"ZISRAWATTDIR".ljust(16, b"\0") + struct.pack("<qq", 256, 256) + bytes(256))
    return path


def _entries(data):
    """Where the entry of each block is, beside its pixels and in the directory; and where its segment is."""
    at = 0
    while at < len(data):
        kind, here = data[at : at + 16].rstrip(b"\0"), at + 32
        if kind == b"ZISRAWSUBBLOCK":
            yield here + 16, here
        elif kind == b"ZISRAWDIRECTORY":
            entry = here + 128
            for _ in range(struct.unpack_from("<i", data, here)[0]):
                yield entry, None
                entry += _entry_bytes(data, entry)
        at = here + struct.unpack_from("<q", data, at + 16)[0]


def _entry_bytes(data, entry):
    return 32 + 20 * struct.unpack_from("<i", data, entry + 28)[0]
