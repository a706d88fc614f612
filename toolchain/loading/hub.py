"""A model from the Hugging Face hub, downloaded into that library's cache."""

from __future__ import annotations

from pathlib import Path

import httpx2
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from boa_edge.errors import BoaEdgeError
from boa_edge.progress import say
from toolchain.loading.papers import PATTERNS
from toolchain.loading.shards import find_shards

# One of these a tokenizer has.
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
# Weights as safetensors, the configuration and the tokenizer; never pickles, never code.
_WANTED = ["*.safetensors", "*.json", "tokenizer.model", "*.jinja", *PATTERNS]


def download(repository: str) -> Path:
    """Directory of the downloaded model.

    Raises:
        BoaEdgeError: offline, unknown, private or gated.
    """
    where = f"hub model {repository!r}"
    try:
        cached = Path(snapshot_download(repository, allow_patterns=_WANTED, local_files_only=True))
        if _is_whole(cached):
            return cached
    except (LocalEntryNotFoundError, OSError, ValueError):
        pass
    if constants.HF_HUB_OFFLINE:
        fix = "Unset HF_HUB_OFFLINE, or pass a model directory"
        raise BoaEdgeError("is not in the cache, or not all of it, and HF_HUB_OFFLINE is set", where=where, fix=fix)
    say(f"downloading {repository}")
    try:
        return Path(snapshot_download(repository, allow_patterns=_WANTED, etag_timeout=10))
    except GatedRepoError:
        raise BoaEdgeError("is gated", where=where, fix="Accept its licence and run `hf auth login`") from None
    except RepositoryNotFoundError:
        fix = "Check the name; for a private model run `hf auth login`"
        raise BoaEdgeError("does not exist on the hub", where=where, fix=fix) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, httpx2.HTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        fix = "Check the network, or pass a model directory that is already on this machine"
        raise BoaEdgeError(f"the hub cannot be reached ({reason})", where=where, fix=fix) from None


def _is_whole(snapshot: Path) -> bool:
    """Whether a model can be loaded from what is in the cache: a download may have been stopped, and other programs
    fetch a configuration or a tokenizer alone.
    """
    try:
        find_shards(snapshot)
    except BoaEdgeError:
        return False
    return any((snapshot / name).exists() for name in _TOKENIZERS)
