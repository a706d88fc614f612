"""Numbers and names as people read them. What an emulator's clock says is never called a latency."""

from __future__ import annotations

from boa_edge.visible import visible
from devices.contract import Execution
from runtime_tests.figure import Figure

METHODS = {
    "original": "Original",
    "rtn": "Round-to-nearest",
    "gptq": "GPTQ",
    "boa": "BoA",
    "turboboa": "TurboBoA",
    "aespa": "aespa",
    "edge": "BoA Edge",
}
RUNTIMES = {"onnx": "ONNX Runtime", "executorch": "ExecuTorch"}
SCHEMES = {
    "per_block": "signed, one scale per block of inputs, found as the model runs",
    "per_token": "asymmetric, one scale per token, found as the model runs",
    "per_row": "asymmetric, one scale per token, found as the model runs, ties rounded as KleidiAI does",
    "static_int8": "signed, one scale per tensor, fixed by calibration",
    "static_uint8": "unsigned, one scale and zero point per tensor, fixed by calibration",
}
PLACES = {
    "attention": "q, k, v",
    "o": "o",
    "mlp": "gate, up",
    "down": "down",
    "head": "head",
}

_TIMES = {
    "load_time": ("Load time", "Emulated load time", "Estimated load time"),
    "first_inference": ("First inference", "Emulated first inference", "Estimated first inference"),
    "time_to_first_token": (
        "Time to first token",
        "Emulated time to first token",
        "Estimated time to first token",
    ),
    "prefill_speed": ("Prefill speed", "Prefill speed in emulated time", "Estimated prefill speed"),
    "decode_speed": ("Decode speed", "Decode speed in emulated time", "Estimated decode speed"),
    "token_time_p50": ("Token latency, p50", "Emulated time per token, p50", "Estimated time per token, p50"),
    "token_time_p90": ("Token latency, p90", "Emulated time per token, p90", "Estimated time per token, p90"),
    "token_time_p99": ("Token latency, p99", "Emulated time per token, p99", "Estimated time per token, p99"),
    "token_time_p95": ("Token latency, p95", "Emulated time per token, p95", "Estimated time per token, p95"),
    "peak_rss": ("Peak memory", "Peak memory, with the emulator", "Estimated peak memory"),
    "pss": (
        "Memory at the end, shared parts split",
        "The same with shared parts split, with the emulator",
        "Estimated PSS",
    ),
    "pss_file": ("of it pages of files (weights, libraries)", "of it pages of files", "of it pages of files"),
    "pss_anon": ("of it written by the process", "of it written by the process", "of it written by the process"),
    "rss": ("Memory at the end", "Memory at the end, with the emulator", "Estimated memory at the end"),
}
_COLUMNS: dict[Execution, int] = {"measured": 0, "emulated": 1, "estimated": 2}
_PREFIXES = ("B", "kB", "MB", "GB", "TB")


def label(name: str, execution: Execution) -> str:
    """The name of a time, a speed or an amount of memory, by how it was come by."""
    return _TIMES[name][_COLUMNS[execution]]


def method_name(method: str) -> str:
    """A method of quantization in words."""
    return METHODS.get(method.lower(), method)


def show(entry: Figure | None) -> str:
    """A figure with its unit; `not recorded` where there is none, and why where its probe gave no value."""
    if entry is None:
        return "not recorded"
    if isinstance(entry.value, str):
        return entry.value
    if entry.unit == "bytes":
        return show_bytes(entry.value)
    if entry.unit == "fraction":
        return f"{100 * entry.value:.1f} %"
    if entry.unit == "ms" and entry.value >= 10_000:
        return f"{entry.value / 1000:.1f} s"
    if entry.unit == "s" and entry.value >= 120:
        return f"{entry.value / 60:.1f} min"
    unit = {"per token": "", "relative squared error": "", "squared error": "", "instructions": ""}
    return f"{number(entry.value)} {unit.get(entry.unit, entry.unit)}".rstrip()


def show_value(entry: Figure | None) -> str:
    """As `show`, without a unit that the column's heading gives: nats per token, seconds."""
    if entry is None or isinstance(entry.value, str) or entry.unit not in ("nats/token", "s"):
        return show(entry)
    return number(entry.value)


def show_bytes(value: float) -> str:
    """Decimal multiples: 94.3 MB."""
    power = 0
    while value >= 999.5 and power < len(_PREFIXES) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.3g} {_PREFIXES[power]}" if power else f"{value:.0f} B"


def number(value: float) -> str:
    """Four significant digits, no exponent where a plain number does."""
    if value == 0 or 1e-4 <= abs(value) < 9999.5:
        return f"{value:.4g}"
    if 9999.5 <= abs(value) < 1e9:
        return f"{value:,.0f}"
    return f"{value:.3e}"


def short(text: str, length: int) -> str:
    """`visible`, cut to `length` characters."""
    text = visible(text).replace("\n", " ")
    return text if len(text) <= length else f"{text[: length - 1]}…"
