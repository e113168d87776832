"""From a picture to what a model reads, as the model says it, and back."""

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn


def image_transform(model: nn.Module) -> Callable[[Image.Image], Tensor]:
    """The evaluation transform of a model: PIL RGB image -> normalised float32 tensor (3, H, W).

    It is timm's, of the model's `pretrained_cfg`, which :func:`lape_vit.load` takes over from the checkpoint.
    """
    return create_transform(**data_config(model))


def data_config(model: Any) -> dict[str, Any]:
    """What timm says of a model's images: `input_size`, `mean`, `std`, `interpolation`, `crop_pct`, `crop_mode`."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return resolve_data_config({} if size is None else {"input_size": (3, *size)}, model=model)


def pixels_of(model: nn.Module, image: Tensor) -> Tensor:
    """A normalised image (3, H, W) as the eye sees it: (H, W, 3), in [0, 1]."""
    config = data_config(model)
    mean, std = (torch.tensor(config[name]) for name in ("mean", "std"))
    return (image.permute(1, 2, 0) * std + mean).clamp(0, 1)
