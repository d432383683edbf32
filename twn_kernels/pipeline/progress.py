"""One progress bar over the inputs of a call, whose description names the phase that is running."""

from __future__ import annotations

import logging
import os

__all__ = ["Progress"]


class Progress:
    """A context manager around ``tqdm``.

    Args:
        total: inputs.
        show: None shows it where the logger ``twn_kernels`` is at level INFO or below.
            ``HF_HUB_DISABLE_PROGRESS_BARS=1`` hides it in either case.
    """

    def __init__(self, total: int, show: bool | None) -> None:
        if show is None:
            show = logging.getLogger("twn_kernels").isEnabledFor(logging.INFO)
        hidden = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() in ("1", "ON", "YES", "TRUE")
        self._total, self._show, self._bar = total, bool(show) and not hidden, None

    def __enter__(self) -> Progress:
        if self._show:
            from tqdm.auto import tqdm

            self._bar = tqdm(total=self._total, unit="input")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def phase(self, name: str) -> None:
        """Show which phase runs: ``gate``, ``think 3/8`` or ``embed``."""
        if self._bar is not None:
            self._bar.set_description(name)

    def done(self, count: int) -> None:
        """Count inputs as embedded."""
        if self._bar is not None:
            self._bar.update(count)
