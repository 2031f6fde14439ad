"""From a patch to what the tower sees, on two paths that end in the same numbers: PIL, and the device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from seal_extract.encoders.spec import EncoderSpec, InputRule
from seal_extract.errors import UsageError
from seal_extract.patches.resample import kernels_run_on, resample, resize_region

_PREMULTIPLIED = ("La", "RGBa")  # Pillow makes no RGB of the one, and darkens where the other is transparent


@dataclass(frozen=True)
class PatchTransform:
    """A PIL image to the normalised tensor that the tower takes; can be pickled into DataLoader workers.

    Attributes:
        input: resize and crop, if any.
        mean: per channel, of RGB in 0..1.
        std: per channel, of RGB in 0..1.
        patch_px: the image is first resized to this side, by the bicubic filter that makes patches of slides.
    """

    input: InputRule
    mean: tuple[float, ...]
    std: tuple[float, ...]
    patch_px: int | None = None

    @classmethod
    def of(cls, spec: EncoderSpec) -> PatchTransform:
        """The transform of an encoder."""
        return cls(spec.input, spec.mean, spec.std)

    def __call__(self, image: Image.Image) -> Tensor:
        """An 8-bit image of any mode, made RGB, to float32 [3, H, W].

        Raises:
            UsageError: not a PIL image, or one of more than 8 bits, or no square where `patch_px` is set.
        """
        if not isinstance(image, Image.Image):
            raise UsageError(
                f"the transform got {type(image).__name__}; give a PIL image, or encode(uint8 tensor)"
            )
        if image.mode[0] in "IF" or image.mode in _PREMULTIPLIED:
            raise UsageError(
                f"the patch is a PIL image of mode {image.mode}; allowed: 8 bits per channel, as RGB"
            )
        patch = np.array(self._fit(self._at_scale(image.convert("RGB"))))  # uint8 [H, W, 3], RGB
        scaled = torch.from_numpy(patch).permute(2, 0, 1).float().div(255)
        return scaled.sub(_per_channel(self.mean)).div(_per_channel(self.std))

    def _at_scale(self, image: Image.Image) -> Image.Image:
        if self.patch_px is None:
            return image
        if image.width != image.height:
            raise UsageError(
                f"the patch is {image.width} x {image.height} px; allowed: a square, which becomes "
                f"{self.patch_px} x {self.patch_px} px"
            )
        return image.resize((self.patch_px, self.patch_px), Image.Resampling.BICUBIC)

    def _fit(self, image: Image.Image) -> Image.Image:
        short, side = self.input.resize_px, self.input.side_px
        if short is None or side is None:
            return image
        height, width = scaled_size(image.height, image.width, short, self.input.squash)
        top, left = middle(height, side), middle(width, side)
        resized = image.resize((width, height), Image.Resampling[self.input.filter.upper()])
        return resized.crop((left, top, left + side, top + side))


def fit(patches: Tensor, rule: InputRule) -> Tensor:
    """Resize and crop uint8 [B, 3, H, W] on its device, to the pixels of `PatchTransform`.

    On the CPU it is Pillow too that resizes; other devices do its integer arithmetic.
    """
    short, side = rule.resize_px, rule.side_px
    if short is None or side is None:
        return patches
    height, width = scaled_size(patches.shape[-2], patches.shape[-1], short, rule.squash)
    top, left = middle(height, side), middle(width, side)
    resized = _resized(patches, (height, width), rule.filter)
    return resized[..., top : top + side, left : left + side]


def _resized(patches: Tensor, size_px: tuple[int, int], filter: str) -> Tensor:
    if patches.device.type != "cpu" or tuple(patches.shape[2:]) == size_px or not len(patches):
        return resample(patches, size_px, filter)  # type: ignore[arg-type]
    images = patches.permute(0, 2, 3, 1).contiguous().numpy()
    by_pillow = np.stack([resize_region(image, size_px, filter) for image in images])  # type: ignore[arg-type]
    return torch.from_numpy(by_pillow).permute(0, 3, 1, 2)


def scaled_size(height: int, width: int, side: int, squash: bool = False) -> tuple[int, int]:
    """Height and width once the shorter of them is ``side``, rounded down as torchvision's Resize does."""
    if squash:
        return side, side
    short = min(height, width)
    return side * height // short, side * width // short


def middle(length: int, side: int) -> int:
    """Where the middle ``side`` pixels begin, rounded as torchvision's CenterCrop does."""
    return round((length - side) / 2)


def check_patches(patches: Tensor, name: str) -> None:
    """Hold patches to uint8 [B, 3, H, W], with at least one pixel.

    Raises:
        UsageError: anything else.
    """
    if not isinstance(patches, Tensor):
        raise UsageError(f"{name} got a {type(patches).__name__}; give a tensor: torch.from_numpy(patches)")
    sides = patches.shape[2:]
    if patches.ndim == 4 and patches.shape[1] == 3 and patches.dtype == torch.uint8 and 0 not in sides:
        return
    kind = str(patches.dtype).removeprefix("torch.")
    hint = "; drop the alpha channel: patches[:, :3]" if patches.ndim == 4 and patches.shape[1] == 4 else ""
    raise UsageError(
        f"{name} got patches {kind} {list(patches.shape)}; allowed: uint8 [B, 3, H, W], RGB{hint}"
    )


def check_sides(height: int, width: int, multiple: int, name: str) -> None:
    """Hold what the tower sees to sides that its patches divide.

    Raises:
        UsageError: with the nearest size that fits.
    """
    if height % multiple == 0 and width % multiple == 0 and height and width:
        return
    near = max(1, round(min(height, width) / multiple)) * multiple
    raise UsageError(
        f"{name} got patches of {width} x {height} px; allowed: sides that are a multiple of {multiple}, "
        f"as {near} x {near}"
    )


def _per_channel(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(3, 1, 1)


def normalise(images: Tensor, mean: Tensor, std: Tensor, precision: torch.dtype) -> Tensor:
    """Normalise uint8 [B, 3, S, S]: float32, or on a GPU what the first matrix multiplies, in ``precision``.

    A GPU reads and writes them once, by a table of the same values. Where the first layer is no matrix, its
    input is rounded once more than by autocast, within 2^-11 in float16 and 2^-8 in bfloat16.

    Args:
        images: on any device.
        mean: [3, 1, 1], of RGB in 0..1.
        std: likewise.
        precision: of the computation.
    """

    def exact(pixels: Tensor) -> Tensor:
        return pixels.float().div_(255).sub_(mean).div_(std)

    if not kernels_run_on(images.device):
        return exact(images)
    from seal_extract.patches.kernels import look_up

    values = torch.arange(256, dtype=torch.uint8, device=images.device)
    return look_up(images, exact(values.expand(3, 1, 256)).to(precision))
