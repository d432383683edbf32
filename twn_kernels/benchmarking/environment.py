"""Where a run happened: device, driver, clocks, versions, commit; what a number needs to be believed elsewhere."""

from __future__ import annotations

import platform
import shutil
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from twn_kernels import env

__all__ = ["cache_bytes", "clocks", "commit_of", "device_name", "now", "peers", "stamp"]

_CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit", "temperature.gpu", "pstate")
_SECONDS = 10
_CPU_CACHE_BYTES = 2**8  # a CPU shows that the path runs, not how fast a cold cache is: two sets of inputs do


def stamp(device: torch.device | str) -> dict[str, Any]:
    """The environment of a run.

    Returns:
        ``device`` (its name), ``device_type``, on a GPU ``gpu`` (capability, memory, multiprocessors, cache, clocks in
        MHz, power limit, driver), and the report of :func:`twn_kernels.env.collect` under its own keys, less the list
        of mapped libraries.
    """
    device = torch.device(device)
    report = {name: value for name, value in env.collect().items() if name not in ("cuda_libraries", "gpus")}
    found: dict[str, Any] = {"device": device_name(device), "device_type": device.type}
    if device.type == "cuda":
        found["gpu"] = _gpu(device)
    return {**found, "cpu_model": _cpu_model(), **report}


def device_name(device: torch.device | str) -> str:
    """The GPU's name, or the CPU's."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_model()


def cache_bytes(device: torch.device | str) -> int:
    """Size of the cache that rotated inputs must exceed."""
    device = torch.device(device)
    if device.type != "cuda":
        return _CPU_CACHE_BYTES
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def commit_of(directory: Path) -> tuple[str, bool | None]:
    """The commit that is checked out in ``directory`` and whether files differ; ``("unknown", None)`` without git."""
    head = _git(directory, "rev-parse", "HEAD")
    changed = _git(directory, "status", "--porcelain", "--untracked-files=no")
    return ("unknown", None) if head is None else (head.strip(), None if changed is None else bool(changed.strip()))


def peers() -> dict[str, str]:
    """Version of each package that one would compare with, or ``absent``.

    Engines bring their kernels inside a server, so no case calls them: a wrong call would be an unfair row.
    """
    found = {}
    for name in env.PEERS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def now() -> str:
    """UTC to the second, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": int(properties.total_memory),
        "multiprocessors": int(properties.multi_processor_count),
        "l2_cache_bytes": int(properties.L2_cache_size),
        "driver": _query("driver_version"),
        **clocks(device),
    }


def clocks(device: torch.device | str) -> dict[str, str]:
    """Clocks, power limit, temperature and performance state at this moment, as the driver's tool words them."""
    return {name: _query(name) for name in _CLOCKS} if torch.device(device).type == "cuda" else {}


def _query(field: str) -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown: no nvidia-smi"
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown: {error}"
    lines = done.stdout.strip().splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else f"unknown: {(done.stdout + done.stderr).strip()}"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *arguments], capture_output=True, text=True, timeout=_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
