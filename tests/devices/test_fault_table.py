"""The fault table of docs/devices.md and the tests say the same."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
DOCUMENT = HERE.parents[1] / "docs" / "devices.md"


def table() -> list[list[str]]:
    """Its rows: fault, outcome, names of tests."""
    text = DOCUMENT.read_text(encoding="utf-8").partition("\n## Faults\n")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return rows[2:]


def names_in(pattern: str) -> set[str]:
    return {
        name
        for path in HERE.glob(pattern)
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }


def test_every_fault_has_a_test_and_every_test_of_faults_is_listed() -> None:
    rows = table()
    assert len(rows) > 20
    assert {len(row) for row in rows} == {3}
    named = [re.findall(r"`(test_\w+)`", row[2]) for row in rows]
    assert all(named)
    listed = {name for names in named for name in names}
    assert listed <= names_in("test_*.py")
    # What is no fault but how things are when nothing fails.
    usual = {
        "test_files_are_pushed_once_and_the_device_is_left_as_it_was",
        "test_a_store_within_its_limit_keeps_what_was_used_last",
        "test_androids_own_shell_and_commands_are_enough",
    }
    assert names_in("test_adb_faults.py") - usual <= listed
