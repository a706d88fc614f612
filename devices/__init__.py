"""Devices that run bundles: this machine and emulated ARM64 ones."""

from __future__ import annotations

from devices.contract import Device, DeviceStatus, Event, GenerateRequest, RunResult, ScoreRequest
from devices.registry import list_devices, open_device

__all__ = [
    "Device",
    "DeviceStatus",
    "Event",
    "GenerateRequest",
    "RunResult",
    "ScoreRequest",
    "list_devices",
    "open_device",
]
