"""Which safetensors files hold a model's weights, and what is in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from boa_edge.errors import BoaEdgeError
from boa_edge.files import read_json

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Stored:
    """Where a tensor is, and its shape."""

    file: Path
    shape: tuple[int, ...]


def find_shards(directory: Path) -> list[Path]:
    """The files of a directory's weights. BoaEdgeError where one is missing, or there are only pickles."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        table = read_json(index, "the shard index")
        names = sorted(set(table.get("weight_map", {}).values())) if isinstance(table, dict) else []
        if not names:
            raise BoaEdgeError("names no shards (weight_map)", where=index)
        if any(Path(name).name != name for name in names):
            raise BoaEdgeError("names a shard outside its directory", where=index)
        shards = [directory / name for name in names]
    else:
        shards = [directory / "model.safetensors"]
    for shard in shards:
        if not shard.exists():
            pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
            if pickles:
                fix = "Pickles can run code and are never read: save the model with safetensors first"
                raise BoaEdgeError(f"only pickle weights found ({', '.join(pickles[:3])})", where=directory, fix=fix)
            raise BoaEdgeError("the weights are missing", where=shard, fix="Download the model again")
    return shards


def stored_tensors(files: Sequence[Path]) -> dict[str, Stored]:
    """Every tensor in these files, by name. BoaEdgeError where one of the files cannot be read."""
    found: dict[str, Stored] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as stream:
                for name in stream.keys():  # noqa: SIM118 (not a mapping)
                    found[name] = Stored(file, tuple(stream.get_slice(name).get_shape()))
        except (SafetensorError, OSError) as error:
            problem = f"is truncated or no safetensors file ({error})"
            raise BoaEdgeError(problem, where=file, fix="Download the file again") from None
    return found
