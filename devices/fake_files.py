"""The `/proc` and `/sys` files of an emulated device, written from its profile.

QEMU's user emulation shows a program the host's own files wherever its `-L` directory holds none; ONNX Runtime's CPU
detection then reads an x86 `/proc/cpuinfo` and crashes while it is loaded.
"""

from __future__ import annotations

from devices.profile import Cpu


def fake_files(cpu: Cpu) -> dict[str, str]:
    """Relative path -> content of every file that the device's CPU shows of itself."""
    last = cpu.cores - 1
    span = f"0-{last}" if last else "0"
    files = {"proc/cpuinfo": _cpuinfo(cpu)}
    base = "sys/devices/system/cpu"
    for name in ("possible", "present", "online"):
        files[f"{base}/{name}"] = f"{span}\n"
    files[f"{base}/kernel_max"] = f"{last}\n"
    for core in range(cpu.cores):
        here = f"{base}/cpu{core}"
        files |= {
            f"{here}/topology/physical_package_id": "0\n",
            f"{here}/topology/core_id": f"{core}\n",
            f"{here}/topology/core_siblings_list": f"{span}\n",
            f"{here}/topology/thread_siblings_list": f"{core}\n",
            f"{here}/topology/cluster_cpus_list": f"{span}\n",
            f"{here}/topology/package_cpus_list": f"{span}\n",
            f"{here}/cpufreq/cpuinfo_min_freq": f"{cpu.min_mhz * 1000}\n",
            f"{here}/cpufreq/cpuinfo_max_freq": f"{cpu.max_mhz * 1000}\n",
            f"{here}/regs/identification/midr_el1": f"0x{cpu.midr:016x}\n",
        }
    return files


def _cpuinfo(cpu: Cpu) -> str:
    lines = []
    for core in range(cpu.cores):
        lines += [
            f"processor\t: {core}",
            "BogoMIPS\t: 50.00",
            f"Features\t: {' '.join(cpu.features)}",
            f"CPU implementer\t: 0x{cpu.implementer:02x}",
            "CPU architecture: 8",
            f"CPU variant\t: 0x{cpu.variant:x}",
            f"CPU part\t: 0x{cpu.part:03x}",
            f"CPU revision\t: {cpu.revision}",
            "",
        ]
    return "\n".join(lines) + "\n"
