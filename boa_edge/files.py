"""Files and directories that are whole or absent: temporary name first, rename last."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from boa_edge.errors import BoaEdgeError, UsageError

_CHUNK = 1 << 20
_NEW = 60.0  # seconds within which a temporary directory may not be held yet
# What a directory is known by that `quantize`, `export`, `measure` or a benchmark has made: a file, and fields in it.
_MARKS = {
    "provenance.json": ("created_by", "source", "recipe"),
    "manifest.json": ("created_by", "recipe", "files"),
    "report.json": ("tool", "deployed", "device"),
    "request.json": ("format", "method"),
}


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
    except ValueError as error:  # also bytes that are no text, and a number of more digits than Python reads
        raise BoaEdgeError(f"{what} is not valid JSON ({error})", where=path) from None
    except RecursionError:
        raise BoaEdgeError(f"{what} is not valid JSON (nested too deeply)", where=path) from None


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


def as_input(name: str | Path | None) -> Path | None:
    """The path that a user's `name` is; None where nothing of that name is there (a hub id, a data set)."""
    path = None if name is None else Path(name).expanduser()
    return path if path is not None and os.path.lexists(path) else None


def check_writable(directory: Path, option: str, *, beside: str | None = None) -> Path:
    """The place that `directory` leads to, where a directory could be made; what the test has made is removed again.

    Args:
        option: whose value it is.
        beside: a name that the names of what will be made there begin with.

    Raises:
        UsageError: nothing can be made there.
    """
    place = Path(os.path.realpath(directory.expanduser()))
    made: list[Path] = []
    try:
        for path in reversed([each for each in (place, *place.parents) if not each.exists()]):
            path.mkdir(exist_ok=True)
            made.append(path)
        # As long as the longest name that is made beside an output.
        made.append(Path(tempfile.mkdtemp(prefix=f".{beside or 'boa-edge'}.probe+solver.unfinished-", dir=place)))
    except OSError as error:
        problem = f"nothing can be written there ({error.strerror})"
        if error.errno == errno.ENAMETOOLONG:
            problem = "the name is too long: temporary names beside it need up to 35 bytes more"
        where = place / beside if beside else place
        raise UsageError(problem, where=where, fix=f"Choose another {option}") from None
    finally:
        for path in reversed(made):
            with contextlib.suppress(OSError):
                path.rmdir()
    return place


def check_output(target: Path, *, overwrite: bool = False, inputs: Mapping[str, Path | None] | None = None) -> Path:
    """The place that `target` leads to, at which `output_directory` can make a directory: before the work, not after.

    Args:
        overwrite: replace a directory that a stage has made; no other is ever replaced unless it is empty.
        inputs: what the work reads, by what it is called.

    Raises:
        UsageError: an input is at `target` or below it, something is there that is not replaced, or nothing can be
            written.
    """
    place = Path(os.path.realpath(target))
    for name, path in (inputs or {}).items():
        if path is not None and _holds(place, path):
            problem = f"is or holds an input of this run, which is never replaced ({name}: {path})"
            raise UsageError(problem, where=target, fix="Choose another -o")
    if os.path.islink(place):
        raise UsageError("is a link that leads to itself", where=target, fix="Choose another -o")
    if os.path.ismount(place):
        problem = "is a mount point, which cannot be replaced"
        raise UsageError(problem, where=target, fix="Name a directory inside it as -o")
    check_writable(place.parent, "-o", beside=place.name)
    if not place.exists():
        return place
    if not place.is_dir():
        raise UsageError("exists and is not a directory", where=target, fix="Choose another -o")
    if not os.access(place, os.R_OK | os.W_OK | os.X_OK):
        raise UsageError("exists and cannot be replaced (no permission)", where=target, fix="Choose another -o")
    if any(place.iterdir()):
        if not _is_made(place):
            problem = "exists already, and boa-edge did not make it: it is never replaced"
            raise UsageError(problem, where=target, fix="Choose another -o, or remove it yourself")
        if not overwrite:
            raise UsageError("exists already", where=target, fix="Choose another -o, or pass --overwrite")
    return place


@contextlib.contextmanager
def output_directory(
    target: Path, *, overwrite: bool = False, inputs: Mapping[str, Path | None] | None = None
) -> Iterator[Path]:
    """Yield a temporary directory beside `target` that becomes `target` when the block succeeds.

    On any failure nothing is left behind, and what a run that was killed has left is removed. The arguments and errors
    are those of `check_output`.
    """
    place = check_output(target, overwrite=overwrite, inputs=inputs)
    with disk_errors(target):
        place.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(place)
        temporary = Path(tempfile.mkdtemp(prefix=f".{place.name}.partial-", dir=place.parent))
    try:
        with disk_errors(target), held(temporary):
            yield temporary
            _open_to_readers(temporary)
            if place.exists():
                # Not as `partial`: what was there before is not for another run to remove.
                retired = Path(tempfile.mkdtemp(prefix=f".{place.name}.replaced-", dir=place.parent)) / "old"
                place.rename(retired)
                temporary.rename(place)
                shutil.rmtree(retired.parent, ignore_errors=True)
            else:
                temporary.rename(place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def held(directory: Path) -> Iterator[bool | None]:
    """Inside, this process holds a directory, wherever it is moved to.

    The hold ends with the process, however that ends. False where another one holds it; None where the file system
    knows no locks.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        is_held: bool | None = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            is_held = False
        except OSError:
            is_held = None
        yield is_held
    finally:
        os.close(descriptor)


def _remove_abandoned(place: Path) -> None:
    """Remove what runs to the same place have left that were killed."""
    for path in place.parent.glob(f".{glob.escape(place.name)}.partial-*"):
        with contextlib.suppress(OSError):
            if path.is_dir() and time.time() - path.stat().st_mtime > _NEW:
                with held(path) as is_free:
                    if is_free:
                        shutil.rmtree(path, ignore_errors=True)


def _holds(directory: Path, path: Path) -> bool:
    """Whether `path` is `directory` or lies below it, by whatever name."""
    real = Path(os.path.realpath(path.expanduser()))
    return any(_is_same(directory, each) for each in (real, *real.parents))


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one == other or one.samefile(other)
    except OSError:
        return False


def _is_made(directory: Path) -> bool:
    """Whether a stage, or a benchmark, has made this directory."""
    for name, fields in _MARKS.items():
        try:
            document = json.loads((directory / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(document, dict) and all(field in document for field in fields):
            return True
    return False


def _open_to_readers(directory: Path) -> None:
    """Give a finished directory the permissions that files made in the open would have."""
    umask = os.umask(0)
    os.umask(umask)
    for path in (directory, *directory.rglob("*")):
        path.chmod((0o777 if path.is_dir() or os.access(path, os.X_OK) else 0o666) & ~umask)
