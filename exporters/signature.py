"""The signature of a bundle: Ed25519 over the bytes of manifest.json, which holds the hash of every other file.

`manifest.sig` is JSON: `schema_version` 1, `algorithm` `ed25519`, `public_key` and `signature` in base64. The public
key in it says which key signed, not whose that key is: to know that, give `verify` the signer's key.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from pathlib import Path
from typing import Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, ValidationError

from boa_edge.errors import BoaEdgeError
from boa_edge.files import read_json

SIGNATURE = "manifest.sig"

_PRIME = 2**255 - 19
# Of a point whose order is 8. With it and the points of order 1, 2 and 4 the curve's points of small order are told by
# their second coordinate: anyone makes a signature that holds for such a key, whatever is signed.
_EIGHTH = int.from_bytes(bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"), "little")
_SMALL_ORDER = (0, 1, _PRIME - 1, _EIGHTH, _PRIME - _EIGHTH)


class Signature(BaseModel):
    """`manifest.sig`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    algorithm: Literal["ed25519"] = "ed25519"
    public_key: str
    signature: str


def check_signature(where: Path, manifest: Path) -> bytes | None:
    """The public key by which `manifest` is signed; None where no signature is there.

    Raises:
        BoaEdgeError: what is there is no signature, or not of this manifest.
    """
    if not os.path.lexists(where):
        return None
    if not where.is_file():
        fix = "Remove it, or sign the bundle again"
        raise BoaEdgeError("is no file, where the signature belongs", where=where, fix=fix)
    try:
        document = Signature.model_validate(read_json(where, "the signature"))
        public = base64.b64decode(document.public_key, validate=True)
        signature = base64.b64decode(document.signature, validate=True)
        key = Ed25519PublicKey.from_public_bytes(public)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "document"
        raise BoaEdgeError(f"'{field}': {first['msg']}", where=where, fix="Sign the bundle again") from None
    except (binascii.Error, ValueError) as error:
        raise BoaEdgeError(f"is no Ed25519 signature ({error})", where=where, fix="Sign the bundle again") from None
    if has_small_order(public):
        found = "the public key has a small order: a signature by it holds for anything"
        raise BoaEdgeError(found, where=where, fix="Get the bundle from whom you trust")
    try:
        key.verify(signature, manifest.read_bytes())
    except InvalidSignature:
        found = f"the signature does not fit {manifest.name}: one of the two was changed"
        raise BoaEdgeError(found, where=where, fix="Get the bundle again, or sign it anew") from None
    return public


def has_small_order(public: bytes) -> bool:
    """Whether an Ed25519 key, 32 bytes, is one of the points whose order divides 8, in any of their spellings."""
    y = int.from_bytes(public, "little") & (2**255 - 1)
    return y % _PRIME in _SMALL_ORDER


def fingerprint(public: bytes) -> str:
    """SHA-256 of a public key, hex."""
    return hashlib.sha256(public).hexdigest()


def text(content: bytes) -> str:
    """In base64."""
    return base64.b64encode(content).decode("ascii")
