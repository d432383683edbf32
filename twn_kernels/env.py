"""What this machine and this installation are: the report to attach to a bug.

Imports the standard library only; every probe is guarded, so that a broken installation still gets its report. GPUs are
listed through the driver's own tool, which leaves CUDA in this process untouched.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

__all__ = ["collect", "collect_gpus", "render"]

LIBRARIES = ("torch", "triton", "transformers", "peft", "safetensors", "numpy", "pillow", "torchvision")
# Variables of other libraries that change what runs here.
RELATED_VARIABLES = ("CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "TRITON_INTERPRET")
# Packages with LoRA kernels or adapter serving of their own, which one would compare with.
PEERS = (
    "vllm", "sglang", "unsloth", "liger-kernel", "lorafusion", "punica-kernels", "flashinfer-python", "bitsandbytes",
)  # fmt: skip
_PROBE_SECONDS = 10


def collect() -> dict:
    """Gather the report; values are strings, numbers, None, or lists and dicts of them (ready for JSON).

    Returns:
        Keys ``twn_kernels``, ``python``, ``os``, ``cpu``, ``libraries``, ``torch``, ``gpus``, ``nvcc``, ``extension``,
        ``implementations``, ``choices``, ``peers``, ``variables``, ``cuda_libraries``. A probe that failed gives
        ``"unknown: <why>"``.
    """
    return {
        "twn_kernels": _guarded(_own_version),
        "python": f"{platform.python_version()} ({sys.executable})",
        "os": _guarded(_os_name),
        "cpu": f"{platform.machine()}, {os.cpu_count()} cores",
        "libraries": {name: _guarded(lambda name=name: _version(name)) for name in LIBRARIES},
        "torch": _guarded(_torch_details),
        "gpus": collect_gpus(),
        "nvcc": _guarded(_nvcc),
        "extension": _guarded(_extension),
        "implementations": _guarded(_implementations),
        "choices": _guarded(_choices),
        "peers": {name: _guarded(lambda name=name: _version(name)) for name in PEERS},
        "variables": _guarded(_variables),
        "cuda_libraries": _guarded(_cuda_libraries),
    }


def collect_gpus() -> list[dict] | str:
    """The GPUs of the driver, each ``name``, ``capability``, ``memory`` and ``driver``; or ``"unknown: <why>"``."""
    return _guarded(_gpus)


def render(report: dict) -> str:
    """The report of :func:`collect` as aligned lines."""
    lines = []
    for name, value in report.items():
        if isinstance(value, dict):
            lines += [(f"{name}.{key}", entry) for key, entry in value.items()] or [(name, "none")]
        elif isinstance(value, list):
            lines += [(f"{name}[{index}]", entry) for index, entry in enumerate(value)] or [(name, "none")]
        else:
            lines.append((name, value))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {_cell(value)}" for name, value in lines)


def _cell(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {entry}" for key, entry in value.items())
    return "not installed" if value is None else str(value)


def _guarded(probe: Callable):
    try:
        return probe()
    except Exception as error:  # a report must not fail on what it reports
        return f"unknown: {type(error).__name__}: {error}"


def _own_version() -> str:
    import twn_kernels

    return f"{twn_kernels.__version__} ({Path(twn_kernels.__file__).parent})"


def _os_name() -> str:
    if sys.platform.startswith("linux"):
        try:
            return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, kernel {platform.release()}"
        except (OSError, KeyError):
            pass
    return platform.platform()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch_details() -> dict:
    import torch

    return {
        "built_for_cuda": torch.version.cuda or "no (CPU build)",
        "sees_gpus": torch.cuda.device_count(),
        "threads": torch.get_num_threads(),
    }


def _gpus() -> list[dict]:
    fields = ("name", "compute_cap", "memory.total", "driver_version")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    if shutil.which(command[0]) is None:
        return []
    done = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_SECONDS)
    if done.returncode != 0:
        raise RuntimeError((done.stdout + done.stderr).strip() or f"nvidia-smi ended with {done.returncode}")
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    names = ("name", "capability", "memory", "driver")
    return [dict(zip(names, row, strict=True)) for row in rows]


def _nvcc() -> str | None:
    homes = [os.path.join(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = os.pathsep.join([*homes, os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    nvcc = shutil.which("nvcc", path=places)
    if nvcc is None:
        return None
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=_PROBE_SECONDS)
    found = re.search(r"release (\S+),", done.stdout)
    return f"{found[1] if found else 'unknown version'} ({nvcc})"


def _extension() -> str:
    from twn_kernels.impl.cuda.loader import build_info

    return str(build_info())


def _implementations() -> dict:
    """For each implementation "available", or why not; and what ``auto`` takes, on the GPU where torch sees one."""
    import torch

    from twn_kernels.impl.cuda.loader import build_info
    from twn_kernels.ops import choice
    from twn_kernels.settings import IMPLS

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table = {}
    for impl in IMPLS:
        if impl != "auto":
            reason = choice.unavailable_reason(impl, device)
            table[impl] = "available" if reason is None else "not available: " + " ".join(reason.split())
    if table["cuda"] == "available" and not build_info().built:
        table["cuda"] = "available: the first call builds it"
    return {**table, "auto": _auto(device, torch.bfloat16 if device.type == "cuda" else torch.float32)}


def _auto(device, dtype) -> str:
    from twn_kernels.errors import ImplUnavailable, OptionError
    from twn_kernels.ops import choice

    try:
        taken = choice.chosen("auto", device, dtype)
    except (OptionError, ImplUnavailable) as error:
        return "fails: " + " ".join(str(error).split())
    return f"{taken.impl} ({taken.reason})"


def _choices() -> dict[str, str]:
    """What the table of measurements that ``auto`` follows holds, by architecture, dtype and site."""
    from twn_kernels.ops import choice_table

    rows = sorted(choice_table.packaged(), key=lambda row: (row.key, row.min_tokens))
    found: dict[str, str] = {}
    for row in rows:
        name, text = " ".join(row.key), f"{row.impl} at {row.min_tokens} to {row.max_tokens} tokens"
        found[name] = f"{found[name]}, {text}" if name in found else text
    none = f"nothing was measured yet: auto takes {choice_table.DEFAULT} on every GPU"
    return {"rows": str(len(rows)) if rows else f"0; {none}", **found}


def _variables() -> dict[str, str]:
    from twn_kernels import settings

    known = {value for name, value in vars(settings).items() if name.startswith("ENV_")}
    found = {name: value for name, value in sorted(os.environ.items()) if name.startswith("TWN_")}
    ours = {name: value if name in known else f"{value} (not read: no such variable)" for name, value in found.items()}
    override = settings.impl_override()
    if override is not None and override not in settings.IMPLS:
        ours[settings.ENV_IMPL] += f" (no known name; there are {', '.join(settings.IMPLS)})"
    return {**ours, **{name: os.environ[name] for name in RELATED_VARIABLES if name in os.environ}}


def _cuda_libraries() -> list[str]:
    """CUDA libraries that are mapped into this process now, with their paths: mixed versions show here."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    paths = {line.split(maxsplit=5)[5].strip() for line in maps.read_text().splitlines() if line.count("/")}
    return sorted(path for path in paths if re.search(r"/lib(cu[a-z]+|nccl|nv[a-zA-Z]+)[-.\w]*\.so", path))
