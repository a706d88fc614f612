"""`boa-edge bundle verify` and `sign`: what a changed, added or foreign file leads to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from boa_edge.errors import BoaEdgeError
from exporters.bundle import RuntimeConfig, write_manifest
from exporters.signing import sign, verify


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    directory = tmp_path / "bundle"
    (directory / "reference").mkdir(parents=True)
    (directory / "model.onnx").write_bytes(b"graph")
    (directory / "LICENSE").write_text("free\n")
    (directory / "reference" / "recipe.yaml").write_text("method: boa\n")
    config = RuntimeConfig(
        schema_version=1,
        runtime="onnx",
        model="model.onnx",
        activations="int8",
        session_config={},
        context_length=64,
        eos_token_ids=(2,),
        bos_token_id=1,
        vocab_size=32,
        layers=1,
        kv_heads=1,
        head_dim=8,
    )
    (directory / "runtime.json").write_text(config.model_dump_json())
    write_manifest(directory, {"method": "boa"})
    return directory


def keys(directory: Path, name: str) -> tuple[Path, Path]:
    """Files with a new private and public key."""
    key = ed25519.Ed25519PrivateKey.generate()
    private, public = directory / f"{name}.pem", directory / f"{name}.pub.pem"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


def test_a_bundle_without_a_signature_is_verified_by_its_manifest(bundle: Path) -> None:
    found = verify(bundle)
    assert (found.signed, found.signer, found.trusted) == (False, None, None)
    assert found.files == 4
    assert found.size_bytes == sum(p.stat().st_size for p in bundle.rglob("*") if p.is_file()) - (
        (bundle / "manifest.json").stat().st_size
    )


def test_a_signature_holds_for_its_key_and_no_other(bundle: Path, tmp_path: Path) -> None:
    private, public = keys(tmp_path, "own")
    _, foreign = keys(tmp_path, "foreign")
    made = sign(bundle, private)
    assert made.signed
    assert verify(bundle).signer == made.signer
    assert verify(bundle).trusted is None  # anyone can sign: only a key that is known says more
    assert verify(bundle, public).trusted is True
    with pytest.raises(BoaEdgeError, match="signed with the key"):
        verify(bundle, foreign)


def test_every_change_after_signing_is_found(bundle: Path, tmp_path: Path) -> None:
    private, public = keys(tmp_path, "own")
    sign(bundle, private)
    model = bundle / "model.onnx"
    model.write_bytes(b"grape")
    with pytest.raises(BoaEdgeError, match=r"model\.onnx"):
        verify(bundle, public)
    write_manifest(bundle, {"method": "boa"})  # now the files fit the manifest, and the signature does not
    with pytest.raises(BoaEdgeError, match="does not fit"):
        verify(bundle, public)
    with pytest.raises(BoaEdgeError, match="does not fit"):
        verify(bundle)


def test_a_file_that_nobody_vouches_for_is_refused(bundle: Path) -> None:
    (bundle / "reference" / "extra.bin").write_bytes(b"x")
    with pytest.raises(BoaEdgeError, match=r"extra\.bin"):
        verify(bundle)


def test_asking_for_a_signature_where_there_is_none(bundle: Path, tmp_path: Path) -> None:
    _, public = keys(tmp_path, "own")
    with pytest.raises(BoaEdgeError, match="not signed"):
        verify(bundle, public)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        '{"schema_version": 1, "algorithm": "rsa", "public_key": "", "signature": ""}',
        '{"schema_version": 1, "algorithm": "ed25519", "public_key": "%%", "signature": ""}',
        '{"schema_version": 1, "algorithm": "ed25519", "public_key": "AAAA", "signature": "AAAA"}',
    ],
)
def test_a_signature_that_is_garbage_is_one_line(bundle: Path, content: str) -> None:
    (bundle / "manifest.sig").write_text(content)
    with pytest.raises(BoaEdgeError, match=r"manifest\.sig"):
        verify(bundle)


def test_keys_that_are_none_are_refused(bundle: Path, tmp_path: Path) -> None:
    private, public = keys(tmp_path, "own")
    other = tmp_path / "rsa.pem"
    rsa_key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    other.write_bytes(rsa_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    locked = tmp_path / "locked.pem"
    secret = ed25519.Ed25519PrivateKey.generate()
    locked.write_bytes(secret.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"word")))
    for path, says in (
        (other, "no Ed25519 key"),
        (public, "no private key"),
        (locked, "encrypted"),
        (tmp_path / "absent.pem", "cannot be read"),
    ):
        with pytest.raises(BoaEdgeError, match=says):
            sign(bundle, path)
    assert not (bundle / "manifest.sig").exists()
    with pytest.raises(BoaEdgeError, match="no public key"):
        verify(bundle, private)


def test_signing_again_replaces_the_signature(bundle: Path, tmp_path: Path) -> None:
    first, second = keys(tmp_path, "first"), keys(tmp_path, "second")
    sign(bundle, first[0])
    sign(bundle, second[0])
    assert json.loads((bundle / "manifest.sig").read_text())["algorithm"] == "ed25519"
    assert verify(bundle, second[1]).trusted is True
