"""What the embedder needs before its first batch: the base model, the gate as a module, and small facts about both."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import twn_kernels.patching as patching
from twn_kernels.checkpoint import Checkpoint
from twn_kernels.errors import CheckpointError, InputError, MissingDependency, OptionError, TWNError
from twn_kernels.modules import GateMLP
from twn_kernels.patching.record import require_record
from twn_kernels.pipeline.backbone import Backbone

__all__ = [
    "as_matrix",
    "base_model",
    "checked_device",
    "end_of_sequence",
    "gate_module",
    "patch_for",
    "processor_source",
    "routes_media",
]

_OLDEST_TRANSFORMERS = (5, 17)  # the oldest that the tests were run with
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def base_model(
    base: str | PathLike | nn.Module, dtype: torch.dtype | str | None, device: torch.device | str | None, hub: dict
) -> nn.Module:
    """The model, loaded where ``base`` names one, on its device.

    Raises:
        OptionError: ``base`` or ``dtype`` is of the wrong kind, or ``dtype`` was given for a loaded model.
        CheckpointError: nothing loadable is there.
        MissingDependency: transformers is absent.
    """
    if isinstance(base, nn.Module):
        if dtype is not None:
            raise OptionError("dtype is for a model that is loaded here; convert a loaded one with model.to(dtype).")
        return base if device is None else base.to(checked_device(device))
    if not isinstance(base, str | PathLike):
        raise OptionError(f"base must be a directory, a hub id or a loaded model, got {type(base).__name__}.")
    device = checked_device(device)
    if isinstance(dtype, str) and dtype not in _DTYPES and dtype != "auto":
        raise OptionError(f"dtype must be a torch.dtype, {', '.join(_DTYPES)} or auto, got {dtype!r}.")
    model = _load(str(base), _DTYPES.get(dtype, dtype or "auto"), hub)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def checked_device(device: torch.device | str | None) -> torch.device | None:
    """The device as torch's own object; None stays None.

    Raises:
        OptionError: torch knows no such device, or this machine or this build of torch has none.
    """
    try:
        found = None if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise OptionError(f'device must be one torch knows, such as "cuda:0" or "cpu", got {device!r}.') from error
    if found is not None and found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        here = f"torch sees {count} GPU{'' if count == 1 else 's'} here" + (f', up to "cuda:{count - 1}"' * (count > 0))
        built = "" if torch.version.cuda or torch.version.hip else f" (torch {torch.__version__} is a CPU build)"
        raise OptionError(f'device "{found}" is not there: {here}{built}. {_other_device()} See: twn-kernels env')
    if found is not None and found.type == "mps" and not torch.backends.mps.is_available():
        raise OptionError(f'device "{found}" is not there: torch has no MPS device here. {_other_device()}')
    return found


def _other_device() -> str:
    if torch.cuda.device_count():
        return 'Use device="cuda" or device="cpu".'
    return 'Use device="cpu", or install a build of torch for the device.'


def _require_transformers() -> None:
    found = importlib.metadata.version("transformers")
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers and (int(numbers[1]), int(numbers[2])) < _OLDEST_TRANSFORMERS:
        oldest = ".".join(map(str, _OLDEST_TRANSFORMERS))
        raise MissingDependency(
            f"the embedder needs transformers>={oldest} (found {found}). Run: pip install -U transformers"
        )


def _load(base: str, dtype: torch.dtype | str, hub: dict) -> nn.Module:
    if importlib.util.find_spec("transformers") is None:
        raise MissingDependency('loading a base model needs transformers. Run: pip install "twn_kernels[hf]"')
    _require_transformers()
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    if not base.strip():
        raise OptionError("base is empty; give a HuggingFace model directory or a hub id owner/name.")
    if Path(base).is_file():
        raise CheckpointError(f"base {base} is a file; give the directory that holds it: {Path(base).parent}")
    looks_local = base.startswith((".", "/", "~")) or base.count("/") != 1
    if looks_local and not Path(base).exists():
        raise CheckpointError(f"base {base} does not exist; give a HuggingFace model directory or a hub id owner/name.")
    if Path(base).exists() and not (Path(base) / "config.json").is_file():
        raise CheckpointError(f"{base} has no config.json; base must be a HuggingFace model directory or a hub id.")
    try:
        config = AutoConfig.from_pretrained(base, **hub)
        multimodal = type(config) in AutoModelForImageTextToText._model_mapping
        auto = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
        return auto.from_pretrained(base, dtype=dtype, **hub)
    except TWNError:
        raise
    except Exception as error:  # transformers, safetensors and the hub client each have errors of their own
        where = "does not load" if Path(base).exists() else "is no directory here and does not load from the Hub"
        raise CheckpointError(f"the base model {base!r} {where}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"


def processor_source(base: str | PathLike | nn.Module, model: nn.Module) -> str:
    """Where the processor of ``base`` lies."""
    if not isinstance(base, nn.Module):
        return str(base)
    name = getattr(model.config, "_name_or_path", "") if hasattr(model, "config") else ""
    if not name:
        raise OptionError(
            "processor must be given: the loaded model does not say which directory it came from. "
            "Pass processor=AutoProcessor.from_pretrained(...)."
        )
    return name


def patch_for(model: nn.Module, checkpoint: Checkpoint, impl: str) -> None:
    """Patch ``model`` with the checkpoint's adapters; a ``PeftModel`` with its own.

    Raises:
        PatchError: the model is patched with another checkpoint's adapters; the fix is to unpatch it first.
    """
    if hasattr(model, "peft_config"):
        patching.patch(model, impl=impl)
    else:
        patching.patch(model, checkpoint, impl=impl)


def routes_media(model: nn.Module) -> bool:
    """Whether a patched layer reads tokens that do not follow the batch's rows, such as those of a vision tower."""
    layers = require_record(model, "embedding").layers.values()
    return any(not getattr(layer, "follows_rows", True) for layer in layers)


def gate_module(checkpoint: Checkpoint, backbone: Backbone) -> GateMLP | None:
    """The checkpoint's gate on the model's device; None where it has none."""
    if checkpoint.gate is None:
        return None
    config = checkpoint.config
    gate = GateMLP(
        checkpoint.gate,
        checkpoint.gate_layout().layers,
        activation=config.gate_activation,
        gate_input=config.gate_input,
    )
    return gate.to(backbone.device).eval().requires_grad_(False)


def end_of_sequence(model: nn.Module, processor: Any) -> set[int]:
    """Token ids that end a text: the generation configuration's, else the tokenizer's."""
    stated = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = stated if isinstance(stated, list | tuple) else [stated]
    found = {int(token) for token in ids if token is not None}
    own = processor.tokenizer.eos_token_id
    return found or ({own} if own is not None else set())


def as_matrix(value: Any, name: str) -> Tensor:
    """fp32 ``[rows, width]`` from an array, a tensor, a list of vectors or one vector."""
    if isinstance(value, list | tuple) and value and isinstance(value[0], Tensor):
        value = torch.stack(list(value))
    try:
        matrix = torch.as_tensor(value).float()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} must be vectors of one width, got {type(value).__name__}: {error}") from error
    matrix = matrix[None] if matrix.dim() == 1 else matrix
    if matrix.dim() != 2:
        raise InputError(f"{name} must be one vector or [rows, width], got {list(matrix.shape)}.")
    return matrix
