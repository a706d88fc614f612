"""Signed bundles: Ed25519 over the bytes of manifest.json, which holds the hash of every other file.

`manifest.sig` is JSON: `schema_version` 1, `algorithm` `ed25519`, `public_key` and `signature` in base64. The public
key in it says which key signed, not whose that key is: to know that, give `verify` the signer's key.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
from pydantic import BaseModel, ConfigDict, ValidationError

from boa_edge.errors import BoaEdgeError
from boa_edge.files import read_json, write_json
from exporters.bundle import MANIFEST, SIGNATURE, Bundle

_MAKE_KEY = "Make one with `openssl genpkey -algorithm ed25519 -out key.pem`"
_PUBLIC = "Its public half: `openssl pkey -in key.pem -pubout -out public.pem`"


class Signature(BaseModel):
    """`manifest.sig`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    algorithm: Literal["ed25519"] = "ed25519"
    public_key: str
    signature: str


@dataclass(frozen=True)
class Verified:
    """A bundle whose files are what its manifest says.

    Attributes:
        files, size_bytes: what the manifest lists.
        signed: a valid signature is there.
        signer: SHA-256 of the public key that signed, hex; None without a signature.
        trusted: the signature was made with the key that the caller gave; None where none was given.
    """

    bundle: Path
    runtime: str
    files: int
    size_bytes: int
    signed: bool
    signer: str | None
    trusted: bool | None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "bundle": str(self.bundle),
            "runtime": self.runtime,
            "files": self.files,
            "size_bytes": self.size_bytes,
            "signed": self.signed,
            "signer": self.signer,
            "trusted": self.trusted,
        }


def sign(bundle: Path, key: Path) -> Verified:
    """Check a bundle and write `manifest.sig`.

    Args:
        key: a private key, PEM, not encrypted.

    Raises:
        BoaEdgeError: a damaged bundle, or no such key.
    """
    opened = Bundle.open(bundle)
    private = _private_key(key)
    public = private.public_key().public_bytes_raw()
    signature = private.sign((bundle / MANIFEST).read_bytes())
    document = Signature(public_key=_text(public), signature=_text(signature))
    write_json(bundle / SIGNATURE, document.model_dump(mode="json"))
    return _verified(opened, public, None)


def verify(bundle: Path, key: Path | None = None) -> Verified:
    """Check every file of a bundle against its manifest, and the manifest against its signature.

    Args:
        key: the signer's public key, PEM; then a signature by it has to be there.

    Raises:
        BoaEdgeError: a file that differs, a file that no manifest lists, or a signature that does not hold.
    """
    opened = Bundle.open(bundle)
    _refuse_strangers(opened)
    wanted = None if key is None else _public_key(key).public_bytes_raw()
    where = bundle / SIGNATURE
    if not where.is_file():
        if wanted is not None:
            raise BoaEdgeError("the bundle is not signed", where=where, fix="Sign it with `boa-edge bundle sign`")
        return _verified(opened, None, None)
    public = _check_signature(where, (bundle / MANIFEST).read_bytes())
    if wanted is not None and public != wanted:
        found = f"signed with the key {_fingerprint(public)}, not with {_fingerprint(wanted)}"
        raise BoaEdgeError(found, where=where, fix="Get the bundle from whom you trust")
    return _verified(opened, public, None if wanted is None else True)


def _verified(opened: Bundle, public: bytes | None, trusted: bool | None) -> Verified:
    files = opened.manifest.files
    return Verified(
        bundle=opened.path,
        runtime=opened.runtime.runtime,
        files=len(files),
        size_bytes=sum(entry.size for entry in files.values()),
        signed=public is not None,
        signer=None if public is None else _fingerprint(public),
        trusted=trusted,
    )


def _refuse_strangers(opened: Bundle) -> None:
    """A file that the manifest does not list is signed by nobody, yet a runtime might read it."""
    known = {*opened.manifest.files, MANIFEST, SIGNATURE}
    for path in sorted(opened.path.rglob("*")):
        name = path.relative_to(opened.path).as_posix()
        if not path.is_dir() and name not in known:
            raise BoaEdgeError(f"is not in {MANIFEST}", where=path, fix="Remove it, or export the bundle again")


def _check_signature(where: Path, content: bytes) -> bytes:
    """The public key that signed `content`."""
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
    try:
        key.verify(signature, content)
    except InvalidSignature:
        found = f"the signature does not fit {MANIFEST}: one of the two was changed"
        raise BoaEdgeError(found, where=where, fix="Get the bundle again, or sign it anew") from None
    return public


def _private_key(path: Path) -> Ed25519PrivateKey:
    key = _key(path, lambda content: load_pem_private_key(content, password=None), "private", _MAKE_KEY)
    return key if isinstance(key, Ed25519PrivateKey) else _refuse_kind(path)


def _public_key(path: Path) -> Ed25519PublicKey:
    key = _key(path, load_pem_public_key, "public", _PUBLIC)
    return key if isinstance(key, Ed25519PublicKey) else _refuse_kind(path)


def _refuse_kind(path: Path) -> NoReturn:
    raise BoaEdgeError("is no Ed25519 key", where=path, fix=_MAKE_KEY)


def _key(path: Path, load: Callable[[bytes], object], half: str, fix: str) -> object:
    """The key of a PEM file, of whatever kind."""
    try:
        return load(_read_key(path))
    except TypeError:
        raise BoaEdgeError("the key is encrypted", where=path, fix="Decrypt it for this command") from None
    except (ValueError, UnsupportedAlgorithm):
        raise BoaEdgeError(f"is no {half} key in PEM", where=path, fix=fix) from None


def _read_key(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BoaEdgeError(f"the key cannot be read ({error.strerror})", where=path, fix=_MAKE_KEY) from None


def _fingerprint(public: bytes) -> str:
    return hashlib.sha256(public).hexdigest()


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")
