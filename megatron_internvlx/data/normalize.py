"""Normalisation of decoded tiles for InternViT, on the tiles' device."""

import functools

import torch

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalize_tiles(tiles_uint8: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Compute `(tiles / 255 - mean) / std` per channel: uint8 [T, 3, S, S] (RGB) to `dtype` [T, 3, S, S].

    Computed in float32 and then cast, as the released transform (ToTensor, Normalize) does. T may be 0.
    """
    if tiles_uint8.dtype != torch.uint8 or tiles_uint8.dim() != 4 or tiles_uint8.size(1) != 3:
        raise ValueError(
            f"expected uint8 tiles [T, 3, S, S], found {tiles_uint8.dtype} {list(tiles_uint8.shape)}"
        )
    mean, std = _statistics(tiles_uint8.device)
    return tiles_uint8.to(torch.float32).div_(255).sub_(mean).div_(std).to(dtype)


@functools.lru_cache(maxsize=8)
def _statistics(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation, fp32 [3, 1, 1], copied to a device once: a step's CUDA graph cannot copy from the host."""
    with torch.inference_mode(False):
        mean, std = (torch.tensor(values, dtype=torch.float32) for values in (IMAGENET_MEAN, IMAGENET_STD))
        return mean.view(3, 1, 1).to(device), std.view(3, 1, 1).to(device)
