"""Outputs: where they may be written, and that nothing but an earlier output is ever replaced."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from boa_edge.errors import UsageError
from boa_edge.files import as_input, check_output, check_writable, output_directory


def make(target: Path, *, overwrite: bool = False) -> None:
    """What a stage does: a directory with a mark in it."""
    with output_directory(target, overwrite=overwrite) as directory:
        (directory / "provenance.json").write_text(json.dumps({"created_by": "boa-edge", "source": {}, "recipe": "x"}))


def test_an_input_is_never_replaced(tmp_path: Path) -> None:
    model = tmp_path / "home" / "model"
    make(model)
    (tmp_path / "link").symlink_to(model)
    for target in (model, model.parent, tmp_path / "link", model / ".." / "model"):
        with pytest.raises(UsageError, match=r"an input of this run, which is never replaced \(the model: .*/model\)"):
            check_output(target, overwrite=True, inputs={"the text": None, "the model": model})
    assert (model / "provenance.json").exists()
    # Spilled activations are not there yet when the output is checked, but would be when it is made.
    with pytest.raises(UsageError, match="--spill"):
        check_output(tmp_path / "new", inputs={"--spill": tmp_path / "new" / "spill"})
    assert check_output(model / "inside", inputs={"the model": model}) == model / "inside"


def test_a_name_that_is_no_path_is_no_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("x")
    assert [as_input(name) for name in (None, "owner/name", "t.txt")] == [None, None, Path("t.txt")]


def test_overwrite_replaces_only_what_a_stage_made(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    make(foreign)  # empty
    make(foreign, overwrite=True)
    with pytest.raises(UsageError, match=r"exists already\. Choose another -o, or pass --overwrite"):
        make(foreign)
    (foreign / "provenance.json").write_text('{"created_by": "somebody"}')
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="boa-edge did not make it: it is never replaced"):
            make(foreign, overwrite=overwrite)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="exists and is not a directory"):
        make(tmp_path / "file", overwrite=True)


@pytest.mark.parametrize(
    ("name", "mark"),
    [
        ("manifest.json", {"schema_version": 1, "created_by": {}, "recipe": {}, "files": {}}),
        ("report.json", {"tool": {}, "deployed": {}, "device": {}}),
        ("request.json", {"format": {}, "method": "edge"}),
    ],
)
def test_every_stage_is_known_by_what_it_leaves(tmp_path: Path, name: str, mark: dict[str, object]) -> None:
    (tmp_path / name).write_text(json.dumps(mark))
    assert check_output(tmp_path, overwrite=True) == tmp_path


def link_to(target: str) -> Callable[[Path], Path]:
    def make_link(root: Path) -> Path:
        (root / "link").symlink_to(target)
        return root / "link"

    return make_link


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (lambda _: Path("/"), "is a mount point, which cannot be replaced. Name a directory inside it as -o"),
        (lambda _: Path("/proc/foo/bar"), "nothing can be written there (No such file or directory)"),
        (lambda root: root / "file" / "x", "nothing can be written there (Not a directory). Choose another -o"),
        (lambda root: root / ("a" * 250), "the name is too long"),
        (lambda root: root / ("a" * 300), "the name is too long"),
        (link_to("link"), "is a link that leads to itself"),
        (link_to("/proc/foo/bar"), "nothing can be written there"),
    ],
    ids=["root", "proc", "below a file", "long", "too long", "loop", "dangling"],
)
def test_an_impossible_output_is_refused_before_the_work(
    tmp_path: Path, target: Callable[[Path], Path], message: str
) -> None:
    (tmp_path / "file").write_text("x")
    output = target(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UsageError) as caught:
        check_output(output, overwrite=True)
    assert message in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_a_check_leaves_nothing_behind(tmp_path: Path) -> None:
    assert check_output(tmp_path / "a" / "b" / "c") == tmp_path / "a" / "b" / "c"
    assert check_writable(tmp_path / "spill" / "x", "--spill") == tmp_path / "spill" / "x"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("x")
    for spill in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(UsageError, match=r"\(Not a directory\)\. Choose another --spill"):
            check_writable(spill, "--spill")


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_followed(tmp_path: Path, there: bool) -> None:
    disk = tmp_path / "disk" / "empty"
    if there:
        disk.mkdir(parents=True)
    (tmp_path / "link").symlink_to(disk)
    make(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert os.listdir(disk) == ["provenance.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]


def test_what_a_killed_run_left_is_removed_and_a_running_ones_is_not(tmp_path: Path) -> None:
    target = tmp_path / "out[1]"

    def aged(path: Path) -> Path:
        path.mkdir(exist_ok=True)
        os.utime(path, (0, 0))
        return path

    abandoned, other = aged(tmp_path / ".out[1].partial-x"), aged(tmp_path / ".out1.partial-x")
    new = tmp_path / ".out[1].partial-new"
    new.mkdir()
    with output_directory(target) as running:
        (running / "file").write_text("x")
        aged(running)
        make(target)
        assert [path.exists() for path in (abandoned, other, new, running, target)] == [False, True, True, True, True]
        aged(running)  # the run to the same place ends first; this one would replace an output that is there
    assert {path.name for path in tmp_path.iterdir()} == {"out[1]", ".out1.partial-x", ".out[1].partial-new"}
