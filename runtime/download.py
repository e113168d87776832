"""Checkpoints from the web, each known by its hash: loaded once per machine, and never unchecked."""

import hashlib
import re
from http.client import HTTPException
from logging import getLogger
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urldefrag, urlsplit

from filelock import FileLock

_logger = getLogger(__name__)

FEWEST_DIGITS = 8  # of a SHA-256, as in the names that torch's hub and DeiT give to their files
HASH_IN_NAME = re.compile(rf"-([0-9a-f]{{{FEWEST_DIGITS},64}})\.\w+$")
HASH_IN_FRAGMENT = re.compile(rf"sha256=([0-9a-f]{{{FEWEST_DIGITS},64}})$", re.IGNORECASE)


def is_url(source: str) -> bool:
    return re.match(r"[a-z][a-z0-9+.-]+://", source, re.IGNORECASE) is not None


def fetch(url: str) -> Path:
    """The local copy of a file of the web, in the folder of torch's hub; downloaded if it is not there.

    Its SHA-256 must begin as the URL says, copy or not: in the file's name (`deit_tiny_patch16_224-a1311bcf.pth`), or
    behind it (`...#sha256=a1311bcf`), which goes before. Of the processes that share the folder one downloads.

    Raises:
        ValueError: no https: URL, none with a hash, or one whose file has another hash.
        OSError: it cannot be downloaded, or written.
    """
    from torch import hub  # here, as a command line is checked before torch is loaded

    address, fragment = urldefrag(url)
    if urlsplit(address).scheme.lower() != "https":
        raise ValueError(f"{url} is refused: give an https: URL, or a file")
    name = Path(urlsplit(address).path).name
    found = HASH_IN_FRAGMENT.match(fragment) or HASH_IN_NAME.search(name)
    if not name or not found or (fragment and found.re is not HASH_IN_FRAGMENT):
        raise ValueError(
            f"{url} is refused, as it does not say the file's hash: append #sha256=HASH, {FEWEST_DIGITS} digits or "
            "more of what sha256sum prints for the right file"
        )
    digits = found[1].lower()
    copy = Path(hub.get_dir()) / "checkpoints" / (name if digits in name else f"{digits[:FEWEST_DIGITS]}-{name}")
    copy.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{copy}.lock"):
        if not (copy.is_file() and _sha256(copy).startswith(digits)):
            _download(address, copy, digits)
    return copy


def _download(address: str, copy: Path, digits: str) -> None:
    from torch import hub

    _logger.info("%s: downloading it to %s", address, copy)
    try:
        hub.download_url_to_file(address, str(copy), hash_prefix=digits, progress=False)
    except (OSError, HTTPException) as error:
        if isinstance(error, HTTPError):
            error.close()  # it is the server's answer, too
        raise OSError(f"{address} cannot be downloaded to {copy}: {error or type(error).__name__}") from error
    except RuntimeError as error:  # torch's word for a wrong hash
        raise ValueError(
            f"{address} is refused: it is damaged, or not the file that was meant: {error}; if its name ends in no "
            "hash, append #sha256=HASH"
        ) from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
