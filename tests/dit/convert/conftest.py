"""Sources of every kind, small."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_qat.dit.methods import RobuQ
from dit_qat.dit.models import DiT
from dit_qat.dit.training import DiTTraining


@pytest.fixture
def checkpoint(tmp_path: Path, make_dit: Callable[..., DiT]) -> Callable[..., Path]:
    """Write a training checkpoint as Lightning lays it out; RobuQ if asked, and EMA."""

    def write(quantized: bool = False, averaged: bool = True, **extra: Any) -> Path:
        method = RobuQ(rank=4, activation_bits=3, distillation=0.0) if quantized else None

        def module(seed: int) -> DiTTraining:
            return DiTTraining(make_dit(seed=seed), method)

        content = {
            "global_step": 3,
            "state_dict": module(0).state_dict(),
            "hyper_parameters": dict(module(0).hparams),
            **extra,
        }
        if averaged:
            content["current_model_state"] = module(1).state_dict()
        path = tmp_path / "last.ckpt"
        torch.save(content, path)
        return path

    return write
