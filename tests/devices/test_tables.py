"""What a user or a device wrote is printed as it is, brackets and all, and steers no terminal."""

from __future__ import annotations

import pytest

from boa_edge.tables import print_devices, print_self_test
from devices import DeviceStatus
from devices.selftest import SelfTest, Step


def test_brackets_are_no_markup(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    print_devices([DeviceStatus("board", "shelf [/left]", None, False, ("adb said [closed]\x1b[2J",))])
    steps = (Step("reach", True, "a [bold]phone[/]", 0.0),)
    print_self_test(SelfTest("android:[fe80::1]:5555", "measured", steps, {}, ("[x]",)))
    shown = capsys.readouterr().err
    for text in ("shelf [/left]", "adb said [closed]⟨U+001B⟩[2J", "unknown", "android:[fe80::1]:5555 (measured)"):
        assert text in shown
    assert "a [bold]phone[/]" in shown
    assert "note: [x]" in shown
    assert "\x1b" not in shown
