"""A TWN directory on disk: load, save, inspect, convert. Needs no PEFT and no base model; runs no code from a file."""

from __future__ import annotations

from twn_kernels.checkpoint.adapter import Adapter, LayerWeights
from twn_kernels.checkpoint.adapter_config import AdapterConfig
from twn_kernels.checkpoint.config import TWNConfig
from twn_kernels.checkpoint.converting import convert_directory, convert_file, convert_pair
from twn_kernels.checkpoint.gate import GateLayer, GateLayout
from twn_kernels.checkpoint.keys import match_modules
from twn_kernels.checkpoint.loading import Checkpoint, load_checkpoint
from twn_kernels.checkpoint.report import CheckpointReport, inspect_checkpoint
from twn_kernels.checkpoint.saving import save_checkpoint

__all__ = [
    "Adapter",
    "AdapterConfig",
    "Checkpoint",
    "CheckpointReport",
    "GateLayer",
    "GateLayout",
    "LayerWeights",
    "TWNConfig",
    "convert_directory",
    "convert_file",
    "convert_pair",
    "inspect_checkpoint",
    "load_checkpoint",
    "match_modules",
    "save_checkpoint",
]
