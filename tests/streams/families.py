"""Small models of transformers, built from a configuration alone; their weights are the seed's."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn


def untrained(name: str, **config: Any) -> nn.Module:
    """Return a model of transformers by its class; without transformers the test is left out."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    kind = getattr(transformers, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model: nn.Module = kind(kind.config_class(**config))
    return model
