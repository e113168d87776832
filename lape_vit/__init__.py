"""How a vision transformer knows where its patches are: encodings, joins, and timm models that take any of them."""

from lape_vit.checkpoints import convert_checkpoint
from lape_vit.vit import VisionTransformer, VisionTransformerDistilled

__all__ = ["VisionTransformer", "VisionTransformerDistilled", "convert_checkpoint"]
__version__ = "0.1.0"
