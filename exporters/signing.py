"""`boa-edge bundle sign` and `verify`: keys in PEM, and what is said of a bundle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from boa_edge.errors import BoaEdgeError
from boa_edge.files import write_json
from exporters.bundle import MANIFEST, Bundle
from exporters.signature import SIGNATURE, Signature, fingerprint, text

_MAKE_KEY = "Make one with `openssl genpkey -algorithm ed25519 -out key.pem`"
_PUBLIC = "Its public half: `openssl pkey -in key.pem -pubout -out public.pem`"


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
    opened = Bundle.open(bundle, signature=False)
    private = _private_key(key)
    public = private.public_key().public_bytes_raw()
    where = bundle / SIGNATURE
    if where.is_dir():
        raise BoaEdgeError("is a directory, where the signature belongs", where=where, fix="Remove it")
    signature = private.sign((bundle / MANIFEST).read_bytes())
    document = Signature(public_key=text(public), signature=text(signature))
    write_json(where, document.model_dump(mode="json"))
    return _verified(opened, public, None)


def verify(bundle: Path, key: Path | None = None) -> Verified:
    """Check every file of a bundle against its manifest, and the manifest against its signature.

    Args:
        key: the signer's public key, PEM; then a signature by it has to be there.

    Raises:
        BoaEdgeError: a file that differs, a file that no manifest lists, or a signature that does not hold.
    """
    opened = Bundle.open(bundle)
    public, where = opened.signer, bundle / SIGNATURE
    if key is None:
        return _verified(opened, public, None)
    wanted = _public_key(key).public_bytes_raw()
    if public is None:
        raise BoaEdgeError("the bundle is not signed", where=where, fix="Sign it with `boa-edge bundle sign`")
    if public != wanted:
        found = f"signed with the key {fingerprint(public)}, not with {fingerprint(wanted)}"
        raise BoaEdgeError(found, where=where, fix="Get the bundle from whom you trust")
    return _verified(opened, public, True)


def _verified(opened: Bundle, public: bytes | None, trusted: bool | None) -> Verified:
    files = opened.manifest.files
    return Verified(
        bundle=opened.path,
        runtime=opened.runtime.runtime,
        files=len(files),
        size_bytes=sum(entry.size for entry in files.values()),
        signed=public is not None,
        signer=None if public is None else fingerprint(public),
        trusted=trusted,
    )


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
