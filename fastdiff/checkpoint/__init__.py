"""Checkpoints: files that are whole or absent, and that say everything needed to use them."""

from fastdiff.checkpoint.files import FORMAT, NewerFormat, read_tensors, replacing, sha256, write_tensors
from fastdiff.checkpoint.lease import Lease
from fastdiff.checkpoint.model import (
    Checkpoint,
    load_checkpoint,
    load_weights,
    model_metadata,
    read_weights,
    refuse_other_architecture,
    save_checkpoint,
)
from fastdiff.checkpoint.steps import (
    begin_step,
    delete_step,
    ema_path,
    find_checkpoint,
    holds_checkpoint,
    manifest_path,
    model_path,
    optimizer_path,
    remove_leftovers,
    saved_steps,
    verify_step,
    write_manifest,
)

__all__ = [
    "FORMAT",
    "Checkpoint",
    "Lease",
    "NewerFormat",
    "begin_step",
    "delete_step",
    "ema_path",
    "find_checkpoint",
    "holds_checkpoint",
    "load_checkpoint",
    "load_weights",
    "manifest_path",
    "model_metadata",
    "model_path",
    "optimizer_path",
    "read_tensors",
    "read_weights",
    "refuse_other_architecture",
    "remove_leftovers",
    "replacing",
    "save_checkpoint",
    "saved_steps",
    "sha256",
    "verify_step",
    "write_manifest",
    "write_tensors",
]
