"""Images as they come from a file."""

from typing import IO

from PIL import Image


class UnreadableImageError(ValueError):
    """What cannot be read as an image; the message names it."""


def read_image(file: str | IO[bytes], name: str) -> Image.Image:
    """The RGB image in a file, open or named by its path.

    Args:
        name: of the image, for the error.

    Raises:
        UnreadableImageError: it is damaged, absent, or no image.
    """
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except Exception as error:  # what is no image can fail in any way
        raise UnreadableImageError(f"{name} cannot be read as an image: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
