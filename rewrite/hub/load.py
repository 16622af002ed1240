"""Load the model of a checkpoint folder into memory, with its weights.

The class is one of transformers, built from `config.json`, and the tensors come from the shards: no
code of the folder runs, and nothing is unpickled.
"""

from __future__ import annotations

import os

import torch
from torch import nn

from rewrite.hub.folder import open_folder
from rewrite.hub.structure import assembled, persistent


def load_folder(
    path: str | os.PathLike[str], map_location: str | torch.device = "cpu"
) -> nn.Module:
    """Return the model of a folder, in eval mode, its tensors in the stored dtypes.

    Raises:
        CheckpointError: the folder is incomplete, or its tensors do not fit its class.
        OptionError: transformers is not installed.
    """
    model, folder, names = assembled(open_folder(os.fspath(path)), meta_buffers=False)
    made: dict[str, nn.Parameter] = {}
    buffers = persistent(model)
    for name, place in names.items():
        owner, _, attr = name.rpartition(".")
        module = model.get_submodule(owner)
        if place not in made:
            tensor = folder.read(place).to(map_location)
            made[place] = nn.Parameter(tensor, tensor.is_floating_point())
        if name in buffers:
            module._buffers[attr] = made[place].detach()
        else:
            module._parameters[attr] = made[place]
    for name, buffer in list(model.named_buffers()):
        if name not in buffers and buffer.device != torch.device(map_location):
            owner, _, attr = name.rpartition(".")
            model.get_submodule(owner)._buffers[attr] = buffer.to(map_location)
    return model
