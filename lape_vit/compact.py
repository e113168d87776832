"""Small transformers for small images: the compact ViT in which 2D encodings were compared, ViT-Lite and CCT.

ViT-Lite and CCT are of Hassani et al. (2021), https://arxiv.org/abs/2104.05704. On a CPU their dropout draws faster
than torch's; other models keep torch's, so that they train as timm's do, bit for bit.
"""

from typing import Any

import torch.nn.functional as F
from timm.layers import Mlp, PatchEmbed, trunc_normal_
from torch import Tensor, nn

from lape_vit.dropout import use_fast_dropout
from lape_vit.vit import VisionTransformer


class CompactMlp(Mlp):
    """timm's MLP with dropout at its end only."""

    def __init__(self, *args: Any, drop: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "drop": (0.0, drop)})


class CompactVisionTransformer(VisionTransformer):
    """A ViT whose convolution and class token start as its linear layers do: truncated normal of deviation 0.02."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        use_fast_dropout(self)

    def init_weights(self, *args: Any, **kwargs: Any) -> None:
        super().init_weights(*args, **kwargs)
        trunc_normal_(self.patch_embed.proj.weight, std=0.02)
        if self.patch_embed.proj.bias is not None:
            nn.init.zeros_(self.patch_embed.proj.bias)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)


class ViTLite(VisionTransformer):
    """A ViT whose trained positions start at a standard deviation of 0.2, and whose convolution as He et al. (2015)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.pos_embed is not None:
            trunc_normal_(self.pos_embed, std=0.2)
        nn.init.kaiming_normal_(self.patch_embed.proj.weight)
        use_fast_dropout(self)


class ConvPool(nn.Conv2d):
    """3 x 3 convolution, ReLU, and 3 x 3 max-pooling by 2: (B, C, height, width) to (B, D, height / 2, width / 2)."""

    def __init__(self, in_chans: int, embed_dim: int, **kwargs: Any) -> None:
        super().__init__(in_chans, embed_dim, kernel_size=3, padding=1, bias=False, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(F.conv2d(x, self.weight, padding=1)), kernel_size=3, stride=2, padding=1)


class ConvTokenizer(PatchEmbed):
    """CCT's overlapping patches, one for each 2 x 2 pixels.

    Raises:
        ValueError: another patch size.
    """

    def __init__(self, *, patch_size: int = 2, in_chans: int = 3, embed_dim: int = 256, **kwargs: Any) -> None:
        super().__init__(patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, **kwargs)
        self._check(patch_size)
        self.proj = ConvPool(in_chans, embed_dim, device=self.proj.weight.device, dtype=self.proj.weight.dtype)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Take images of (height, width) `img_size` pixels."""
        self._check(2 if patch_size is None else patch_size)
        super().set_input_size(img_size=img_size)

    @staticmethod
    def _check(patch_size: Any) -> None:
        if patch_size not in (2, (2, 2), [2, 2]):
            raise ValueError(f"patch_size={patch_size}: the tokenizer of CCT-7/3x1 makes patches of 2 x 2 pixels only")


class SequencePool(nn.Module):
    """Mean of all tokens (B, N, D), weighted by a softmax over a trained score of each: (B, D); eq. (4) to (6)."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.score = nn.Linear(embed_dim, 1)
        trunc_normal_(self.score.weight, std=0.02)
        nn.init.zeros_(self.score.bias)

    def forward(self, x: Tensor) -> Tensor:
        return (self.score(x).softmax(dim=1) * x).sum(dim=1)


class CompactConvolutionalTransformer(ViTLite):
    """CCT: a convolutional tokenizer, no class token, and sequence pooling.

    Its blocks are those of a ViT, norm first; the authors' code also normalises the residual before the MLP.

    Raises:
        ValueError: a class token or another pool.
    """

    def __init__(self, *args: Any, class_token: bool = False, global_pool: str = "map", **kwargs: Any) -> None:
        # "map" is timm's name for a trained pool of all tokens; ours takes the place of the one that it makes
        if class_token or global_pool != "map":
            raise ValueError(
                f"class_token={class_token}, global_pool={global_pool!r}: CCT pools all tokens (map) alone"
            )
        super().__init__(*args, class_token=False, global_pool="map", embed_layer=ConvTokenizer, **kwargs)
        weight = self.patch_embed.proj.weight
        self.attn_pool = SequencePool(self.embed_dim).to(weight.device, weight.dtype)  # type: ignore[assignment]
