"""Files and directories that are whole or absent: temporary name first, rename last."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from boa_edge.errors import BoaEdgeError, UsageError

_CHUNK = 1 << 20


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def write_json(path: Path, document: Any) -> None:
    """Write `document` as indented JSON, through a temporary name."""
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, through a temporary name in the same directory."""
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with disk_errors(path):
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path, what: str) -> Any:
    """Parse a JSON file of the user's; `what` names its role in the error."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BoaEdgeError(f"{what} is missing", where=path) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BoaEdgeError(f"{what} is not valid JSON ({error})", where=path) from None


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or a forbidden write below `path` into one clear line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BoaEdgeError("the disk is full", where=path, fix="Free some space or choose another -o") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise BoaEdgeError(f"cannot be written ({error.strerror})", where=path) from error
        raise


def check_output(target: Path, *, overwrite: bool = False) -> None:
    """Raise UsageError where `output_directory` would refuse `target`: before the work, not after it."""
    if target.exists() and not target.is_dir():
        raise UsageError("exists and is not a directory", where=target, fix="Choose another -o")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise UsageError("exists already", where=target, fix="Choose another -o, or pass --overwrite")


@contextlib.contextmanager
def output_directory(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary directory beside `target` that becomes `target` when the block succeeds.

    On any failure nothing is left behind. An existing, non-empty `target` is an error unless `overwrite`.
    """
    target = target.absolute()
    check_output(target, overwrite=overwrite)
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        with disk_errors(target):
            yield temporary
            _open_to_readers(temporary)
            if target.exists():
                retired = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent)) / "old"
                target.rename(retired)
                temporary.rename(target)
                shutil.rmtree(retired.parent, ignore_errors=True)
            else:
                temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _open_to_readers(directory: Path) -> None:
    """Give a finished directory the permissions that files made in the open would have."""
    umask = os.umask(0)
    os.umask(umask)
    for path in (directory, *directory.rglob("*")):
        path.chmod((0o777 if path.is_dir() or os.access(path, os.X_OK) else 0o666) & ~umask)
