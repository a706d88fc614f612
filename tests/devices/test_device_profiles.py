"""A profile says what a device is; its files and QEMU's CPU must both say the same."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boa_edge.errors import UsageError
from devices import list_devices, open_device, tools
from devices.fake_files import fake_files
from devices.profile import Cpu, known_profiles, load_profile, read_profile
from devices.qemu import QemuTransport

CPUS = st.builds(
    Cpu,
    qemu=st.just(("max",)),
    cores=st.integers(1, 64),
    implementer=st.integers(0, 0xFF),
    part=st.integers(0, 0xFFF),
    variant=st.integers(0, 0xF),
    revision=st.integers(0, 0xF),
    min_mhz=st.integers(1, 900),
    max_mhz=st.integers(900, 9000),
    features=st.lists(st.sampled_from(["fp", "asimd", "asimddp", "i8mm"]), min_size=1, unique=True).map(tuple),
)

VALID = """
description = "mine"
transport = "qemu"
[cpu]
qemu = ["cortex-a72"]
cores = 2
implementer = 0x41
part = 0xd08
variant = 0
revision = 3
min_mhz = 500
max_mhz = 1500
features = ["fp", "asimd"]
"""


@given(CPUS)
def test_every_core_shows_the_profiles_cpu(cpu: Cpu) -> None:
    files = fake_files(cpu)
    blocks = [block for block in files["proc/cpuinfo"].split("\n\n") if block.strip()]
    assert len(blocks) == cpu.cores
    for core, block in enumerate(blocks):
        fields = {key.strip(): value.strip() for key, value in (line.split(":") for line in block.splitlines())}
        assert fields["processor"] == str(core)
        assert tuple(fields["Features"].split()) == cpu.features
        assert int(fields["CPU part"], 16) == cpu.part
        midr = int(files[f"sys/devices/system/cpu/cpu{core}/regs/identification/midr_el1"], 16)
        assert (midr >> 24, midr >> 4 & 0xFFF, midr >> 20 & 0xF, midr & 0xF) == (
            cpu.implementer,
            cpu.part,
            int(fields["CPU variant"], 16),
            int(fields["CPU revision"]),
        )


@given(CPUS)
def test_the_core_list_has_as_many_cores_as_directories(cpu: Cpu) -> None:
    files = fake_files(cpu)
    listed = files["sys/devices/system/cpu/present"].strip().split("-")
    assert int(listed[-1]) - int(listed[0]) + 1 == cpu.cores
    assert len({name.split("/")[4] for name in files if "/cpu/cpu" in name}) == cpu.cores
    assert int(files["sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq"]) == cpu.max_mhz * 1000


EMULATED = ("arm64", "arm64-a53", "arm64-i8mm")


def test_the_shipped_profiles_differ_in_dot_products_and_int8_matrices() -> None:
    assert {"host", "android", *EMULATED} <= set(known_profiles())
    assert next(iter(known_profiles())) == "host"
    features = {name: set(load_profile(name).cpu.features) for name in EMULATED}  # type: ignore[union-attr]
    assert {"asimddp", "fphp", "asimdhp"} <= features["arm64"] < features["arm64-i8mm"]
    assert "asimddp" not in features["arm64-a53"]
    assert [name for name in EMULATED if "i8mm" in features[name]] == ["arm64-i8mm"]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (("cores = 2", "cores = 2\ncoers = 3"), "unknown key 'cpu.coers'; did you mean 'cores'"),
        (('transport = "qemu"', 'transport = "qemu"\ndescriptoin = "x"'), "did you mean 'description'"),
        (("cores = 2", "cores = 0"), "cpu.cores"),
        (("cores = 2", ""), "'cpu.cores': Field required"),
        (("part = 0xd08", "part = 0x1000"), "cpu.part"),
        (("min_mhz = 500", "min_mhz = 5000"), "min_mhz 5000 is above max_mhz 1500"),
        (('"cortex-a72"', '"cortex-a72 -L /"'), "cpu.qemu"),
        (('transport = "qemu"', 'transport = "local"'), "remove [cpu]"),
        (('transport = "qemu"', 'transport = "adb"'), "'cpu' has no meaning for transport 'adb'"),
        (('transport = "qemu"', 'transport = "usb"'), "transport"),
        (('transport = "qemu"', 'transport = "qemu"\nserial = "x"'), "'serial' has no meaning for transport 'qemu'"),
        (('description = "mine"', 'name = "other"'), "the file's name is the device's name"),
        (("[cpu]", "[cpu"), "not valid TOML"),
        (("cores = 2", f"cores = {'2' * 5000}"), "not valid TOML"),
        (("cores = 2", f"cores = {'[' * 2000}"), "not valid TOML"),
    ],
)
def test_a_wrong_profile_is_one_line_that_names_file_and_key(
    tmp_path: Path, change: tuple[str, str], found: str
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(VALID.replace(*change), encoding="utf-8")
    with pytest.raises(UsageError) as error:
        read_profile(path)
    assert str(path) in str(error.value)
    assert found in str(error.value)
    assert "\n" not in str(error.value)


def test_a_users_own_profile_is_a_device(tmp_path: Path) -> None:
    path = tmp_path / "my-board.toml"
    path.write_text(VALID, encoding="utf-8")
    device = open_device(str(path))
    assert (device.name, device.execution) == ("my-board", "emulated")


def test_profiles_of_the_users_own_stand_in_the_list(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place = tmp_path / "boa-edge" / "devices"
    place.mkdir(parents=True)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (place / "board.toml").write_text(VALID, encoding="utf-8")
    (place / "broken.toml").write_text("transport = 1", encoding="utf-8")
    lost = 'description = "x"\ntransport = "ssh"\nhost = "x"\nidentity = "~nobody-of-that-name/id"\n'
    (place / "lost.toml").write_text(lost, encoding="utf-8")
    (place / "ssh.toml").write_text('description = "mine"\ntransport = "ssh"\nhost = "pi@board"\n', encoding="utf-8")
    assert (open_device("board").name, open_device("board").execution) == ("board", "emulated")
    assert load_profile("ssh").host == "pi@board"  # the user's wins over ours
    assert list(known_profiles()).count("ssh") == 1
    monkeypatch.setenv("PATH", str(tmp_path))
    statuses = {status.name: status for status in list_devices()}
    assert "host" in statuses
    assert not statuses["broken"].usable
    assert str(place / "broken.toml") in " ".join(statuses["broken"].missing)
    assert "home directory" in " ".join(statuses["lost"].missing)


def test_paths_in_a_profile_are_relative_to_it(tmp_path: Path) -> None:
    path = tmp_path / "phone.toml"
    text = 'description = "x"\ntransport = "adb"\nrunner_path = "build/runner"\nrunner_files = ["lib.so"]\n'
    path.write_text(text, encoding="utf-8")
    profile = read_profile(path)
    assert profile.runner_path == tmp_path / "build" / "runner"
    assert profile.runner_files == (tmp_path / "lib.so",)


def test_a_target_after_a_colon_is_the_serial_or_the_host() -> None:
    assert load_profile("android:192.168.1.5:5555").serial == "192.168.1.5:5555"
    again = "adb-R5CT123-abcdef (2)._adb-tls-connect._tcp"  # as adb shows a phone that it has met before
    assert load_profile(f"android:{again}").serial == again
    assert load_profile("ssh:pi@board").host == "pi@board"
    assert load_profile("ssh:pi@board").name == "ssh:pi@board"
    for name in ("arm64:x", "android:", "android:-s", "android:a b"):
        with pytest.raises(UsageError):
            load_profile(name)


def test_the_profile_in_the_documentation_is_one(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "devices.md").read_text(encoding="utf-8")
    block = text.split("    # ~/.config/boa-edge/devices/pixel.toml")[1].split("\n\n")[0]
    path = tmp_path / "pixel.toml"
    path.write_text("#" + block.replace("\n    ", "\n"), encoding="utf-8")
    profile = read_profile(path)
    assert (profile.transport, profile.serial, profile.server) == ("adb", "0A1B2C3D", "labhost:5037")


@pytest.mark.parametrize(
    ("name", "hint"), [("arm46", "Did you mean arm64?"), ("zzz", "host, android, arm64, arm64-a53")]
)
def test_an_unknown_device_names_close_ones(name: str, hint: str) -> None:
    with pytest.raises(UsageError, match="unknown device") as error:
        open_device(name)
    assert hint in str(error.value)


def test_a_missing_profile_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        open_device(str(tmp_path / "none.toml"))


def test_devices_without_their_tools_say_which_and_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("BOA_EDGE_CACHE", str(tmp_path / "cache"))
    statuses = {status.name: status for status in list_devices()}
    assert not any(status.usable for status in statuses.values())
    lacks = " ".join(statuses["arm64"].missing)
    for word in ("qemu-user", "g++-aarch64-linux-gnu", "ARM64 library of onnxruntime", "fix: make setup"):
        assert word in lacks
    assert statuses["host"].execution == "measured"
    assert statuses["arm64"].execution == "emulated"


PROBE = r"""
#include <sys/auxv.h>
#include <fstream>
#include <iostream>
int main(int argc, char** argv) {
    std::cout << getauxval(AT_HWCAP) << " " << getauxval(AT_HWCAP2) << "\n";
    for (int i = 1; i < argc; ++i) std::cout << std::ifstream(argv[i]).rdbuf();
}
"""
# Bits of AT_HWCAP on 64-bit ARM Linux.
HWCAP = {
    0: "fp", 1: "asimd", 2: "evtstrm", 3: "aes", 4: "pmull", 5: "sha1", 6: "sha2", 7: "crc32", 8: "atomics",
    9: "fphp", 10: "asimdhp", 11: "cpuid", 12: "asimdrdm", 13: "jscvt", 14: "fcma", 15: "lrcpc", 16: "dcpop",
    17: "sha3", 18: "sm3", 19: "sm4", 20: "asimddp", 21: "sha512", 22: "sve", 23: "asimdfhm", 24: "dit", 25: "uscat",
    26: "ilrcpc", 27: "flagm", 28: "ssbs", 29: "sb", 30: "paca", 31: "pacg",
}  # fmt: skip
# Bits of AT_HWCAP2; the scalable ones are not told apart.
HWCAP2 = {0: "dcpodp", 1: "sve2", 7: "flagm2", 8: "frint", 13: "i8mm", 14: "bf16", 15: "dgh", 17: "bti"}


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("probe")
    (directory / "probe.cpp").write_text(PROBE, encoding="utf-8")
    command = [str(tools.require(tools.CROSS)), "-static", "-O1", str(directory / "probe.cpp")]
    subprocess.run([*command, "-o", str(directory / "probe")], check=True, timeout=120)
    return directory / "probe"


@pytest.mark.emulated
@pytest.mark.parametrize("name", EMULATED)
def test_the_profile_and_the_emulated_cpu_agree(name: str, probe: Path) -> None:
    profile = load_profile(name)
    assert profile.cpu is not None
    transport = QemuTransport(profile)
    paths = ["/proc/cpuinfo", "/sys/devices/system/cpu/present"]
    with transport.open() as workplace:
        emulate = workplace.command("ignored", ())[:5]
        done = subprocess.run([*emulate, str(probe), *paths], capture_output=True, text=True, check=True, timeout=60)
    first, _, shown = done.stdout.partition("\n")
    words = [int(word) for word in first.split()]
    emulated = {
        name for word, bits in zip(words, (HWCAP, HWCAP2), strict=True) for bit, name in bits.items() if word >> bit & 1
    }
    claimed = set(profile.cpu.features)
    # What is claimed must run (no illegal instructions); kernels are chosen by these, so nothing of them may be extra.
    chosen_by = {"asimd", "asimddp", "asimdhp", "fphp", "atomics", "sve", "sve2", "aes", "i8mm", "bf16"}
    # The event stream and the identification registers are the kernel's, which QEMU stands in for.
    assert claimed - {"evtstrm", "cpuid"} <= emulated
    if transport.fingerprint()["cpu_as_profiled"]:
        assert emulated & chosen_by == claimed & chosen_by
    files = fake_files(profile.cpu)
    assert shown == files["proc/cpuinfo"] + files["sys/devices/system/cpu/present"]
