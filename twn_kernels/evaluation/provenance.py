"""What a result needs to be believed elsewhere: when, which commit, which versions, how many parameters.

Asks the installed packages and git; nothing here touches a GPU.
"""

from __future__ import annotations

import platform
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from twn_kernels.settings import ADAPTERS

__all__ = ["parameters", "stamp", "version"]

_LIBRARIES = ("twn_kernels", "torch", "transformers", "peft", "numpy", "pillow")
_LIBRARIES += ("scipy", "scikit-learn", "pytrec_eval-terrier")
_SECONDS = 10


def stamp() -> dict[str, Any]:
    """``created`` (UTC), ``commit`` of the checkout that the package runs from (``"unknown"`` outside of one),
    ``dirty`` and ``versions``."""
    root = Path(__file__).resolve().parents[2]
    head = _git(root, "rev-parse", "HEAD")
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    return {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": head or "unknown",
        "dirty": None if head is None or changed is None else bool(changed),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}},
    }


def version(name: str) -> str:
    """Version of an installed package, or ``"absent"``."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"


def _git(root: Path, *words: str) -> str | None:
    if not (root / ".git").exists():
        return None  # installed into some other project's tree, whose commit would say nothing
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def parameters(embedder: Any) -> dict[str, int | float] | None:
    """What adapters, gate and queries add to the base.

    Returns:
        counts ``base``, ``reasoning``, ``embedding``, ``gate``, ``queries``, ``added`` and ``added_percent``; None
        where ``embedder`` is not one of this package.
    """
    model, checkpoint = getattr(embedder, "model", None), getattr(embedder, "checkpoint", None)
    if model is None or checkpoint is None:
        return None
    counts = dict.fromkeys(("base", *ADAPTERS), 0)
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        adapter = next((part for part in parts if part in ADAPTERS), None)
        is_lora = any(part.startswith("lora_") for part in parts)
        counts[adapter if is_lora and adapter is not None else "base"] += parameter.numel()
    counts["gate"] = sum(value.numel() for value in (checkpoint.gate or {}).values())
    counts["queries"] = checkpoint.queries.numel()
    added = sum(counts.values()) - counts["base"]
    return {**counts, "added": added, "added_percent": 100 * added / counts["base"]}
