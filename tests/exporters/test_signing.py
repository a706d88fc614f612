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
from exporters.bundle import Bundle, RuntimeConfig, write_manifest
from exporters.signature import Signature, has_small_order, text
from exporters.signing import sign, verify
from runtime_tests.facts import open_bundle


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


def test_a_signature_that_is_no_file(bundle: Path, tmp_path: Path) -> None:
    private, _ = keys(tmp_path, "own")
    where = bundle / "manifest.sig"
    where.mkdir()
    with pytest.raises(BoaEdgeError, match=r"manifest\.sig: is no file"):
        verify(bundle)
    with pytest.raises(BoaEdgeError, match=r"manifest\.sig: is a directory"):
        sign(bundle, private)
    where.rmdir()
    where.symlink_to(tmp_path / "nowhere")
    with pytest.raises(BoaEdgeError, match=r"manifest\.sig: is no file"):
        Bundle.open(bundle)


@pytest.mark.parametrize("content", ["{}", "[1]", "stale"])
def test_whoever_opens_a_bundle_checks_its_signature(bundle: Path, tmp_path: Path, content: str) -> None:
    private, _ = keys(tmp_path, "own")
    sign(bundle, private)
    Bundle.open(bundle)
    if content == "stale":
        (bundle / "reference" / "recipe.yaml").write_text("method: rtn\n")
        write_manifest(bundle, {"method": "rtn"})
    else:
        (bundle / "manifest.sig").write_text(content)
    for opened in (Bundle.open, open_bundle):
        with pytest.raises(BoaEdgeError, match=r"manifest\.sig"):
            opened(bundle)
    sign(bundle, private)  # anew
    assert Bundle.open(bundle).signer is not None


def test_nothing_is_signed_that_is_not_verified_afterwards(bundle: Path, tmp_path: Path) -> None:
    private, _ = keys(tmp_path, "own")
    (bundle / "extra.bin").write_bytes(b"x")
    with pytest.raises(BoaEdgeError, match=r"extra\.bin: is not in manifest\.json"):
        sign(bundle, private)
    assert not (bundle / "manifest.sig").exists()


def spellings_of_small_order() -> list[bytes]:
    """Found by arithmetic on the curve, apart from the program's table: all points of order 1, 2, 4 and 8."""
    p = 2**255 - 19
    d = -121665 * pow(121666, -1, p) % p

    def add(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
        t = d * a[0] * b[0] * a[1] * b[1]
        x = (a[0] * b[1] + b[0] * a[1]) * pow(1 + t, -1, p) % p
        return x, (a[1] * b[1] + a[0] * b[0]) * pow(1 - t, -1, p) % p

    def point(y: int) -> tuple[int, int] | None:
        square = (y * y - 1) * pow(d * y * y + 1, -1, p) % p
        x = pow(square, (p + 3) // 8, p)
        x = x if x * x % p == square else x * pow(2, (p - 1) // 4, p) % p
        return (x, y) if x * x % p == square else None

    order, found = 2**252 + 27742317777372353535851937790883648493, set()
    for y in range(2, 60):
        start, total = point(y), (0, 1)
        if start is None:
            continue
        power = start
        for bit in range(order.bit_length()):  # times the large prime: what is left has a small order
            total = add(total, power) if order >> bit & 1 else total
            power = add(power, power)
        found.add(total)
    assert len(found) >= 4  # (y alone tells x up to its sign)
    ys = {y for _, y in found}
    raw = [y + more for y in ys for more in (0, p) if y + more < 2**255]
    return [(y | sign << 255).to_bytes(32, "little") for y in raw for sign in (0, 1)]


def test_keys_by_which_anyone_signs_are_refused(bundle: Path) -> None:
    for public in spellings_of_small_order():
        assert has_small_order(public)
    assert not has_small_order(ed25519.Ed25519PrivateKey.generate().public_key().public_bytes_raw())
    # The neutral element signs everything with the same 64 bytes.
    neutral = b"\1" + bytes(31)
    document = Signature(public_key=text(neutral), signature=text(neutral + bytes(32)))
    (bundle / "manifest.sig").write_text(document.model_dump_json())
    with pytest.raises(BoaEdgeError, match=r"manifest\.sig: the public key has a small order"):
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
