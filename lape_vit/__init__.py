"""How a vision transformer knows where its patches are: encodings, joins, and timm models that take any of them."""

from lape_vit.convert import WarmStart, convert_checkpoint, warm_start
from lape_vit.from_checkpoint import describe, load
from lape_vit.timm_models import from_timm
from lape_vit.vit import VisionTransformer, VisionTransformerDistilled

__all__ = [
    "VisionTransformer",
    "VisionTransformerDistilled",
    "WarmStart",
    "convert_checkpoint",
    "describe",
    "from_timm",
    "load",
    "warm_start",
]
__version__ = "0.1.0"
