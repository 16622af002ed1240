"""The calls that evidence rests on: those given, or those that a model's users make.

A model of transformers says in its configuration and in the names of its forward's arguments what
it takes. Generation models are called as generation calls them: a prefill, a padded batch of two,
and one more step with the cache of the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from rewrite.errors import OptionError, one_line
from rewrite.observe.image_calls import images_in_text
from rewrite.runtime.configured.maker import InputMaker, forward_arguments
from rewrite.runtime.inputs import ExampleCall, Inputs, call
from rewrite.runtime.leaves import leaves, mapped
from rewrite.runtime.quiet import quiet_fakes
from rewrite.runtime.stand_in import stand_in
from rewrite.runtime.tree import Tree
from rewrite.runtime.trial import trial
from rewrite.tracing.dry_run import on_meta

_PADDED = 3
_CACHES = ("past_key_values", "cache", "cache_params")
"""What the cache of a first call is called in its output, and in the arguments of the next."""


def given_calls(given: Sequence[Any]) -> tuple[ExampleCall, ...]:
    """Return the calls that a user gave: tensors, tuples of positional inputs, or keywords.

    Raises:
        OptionError: no call was given, one holds no tensor, or it is one call and no list of them.
    """
    if not isinstance(given, list | tuple):
        raise OptionError(
            f"example_calls is a {type(given).__name__}: give a list of calls, each as "
            "example_inputs"
        )
    if not given:
        raise OptionError("example_calls is empty: give at least one call, or leave it out")
    calls = []
    for number, item in enumerate(given, start=1):
        if isinstance(item, ExampleCall):
            calls.append(item)
            continue
        inputs = Inputs.of(item)
        if not any(isinstance(leaf, torch.Tensor) for _, leaf in _leaves(inputs)):
            raise OptionError(f"example call {number} holds no tensor")
        calls.append(ExampleCall(f"call {number} ({', '.join(_described(inputs))})", inputs))
    return tuple(calls)


def known_calls(
    model: nn.Module, inputs: Inputs | None, given: Sequence[Any] | None, seed: int = 0
) -> tuple[ExampleCall, ...]:
    """Return the calls that may be observed: those given, or those that are known of the model."""
    if given is not None:
        return given_calls(given)
    calls = default_calls(model, seed)
    if inputs is None:
        return calls
    return (ExampleCall("example input", inputs), *calls)


def default_calls(model: nn.Module, seed: int = 0) -> tuple[ExampleCall, ...]:
    """Return the calls that the users of a transformers model make; () for any other model.

    Each is tried: what the model refuses is left out.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "model_type"):
        return ()
    with trial(model) as copied:
        return tuple(_calls_of_users(copied, config, seed))


def _calls_of_users(model: nn.Module, config: Any, seed: int) -> list[ExampleCall]:
    generator = torch.Generator().manual_seed(seed)
    calls: list[ExampleCall] = []
    made = InputMaker(model, config, generator)
    output = None
    for both in (False, True):  # some models of text and images want both
        made.both = both
        first = made.inputs(1)
        output = None if first is None else _tried(model, first)
        if output is not None:
            break
    if first is None or output is None:
        return []
    generates = "input_ids" in first
    calls.append(ExampleCall("prefill" if generates else "one sample", Inputs((), first)))
    two = made.inputs(2) or {}
    if generates and "attention_mask" in forward_arguments(model):
        mask = torch.ones_like(two["input_ids"])
        mask[0, :_PADDED] = 0
        two = {**two, "attention_mask": mask}
    if _taken(model, two):
        name = "padded mask, batch 2" if "attention_mask" in two else "batch 2"
        calls.append(ExampleCall(name, Inputs((), two)))
    calls += _image_calls(model, config, first)
    calls += _token_type_calls(model, first)
    if generates and "pixel_values" in forward_arguments(model) and "pixel_values" not in first:
        tried = images_in_text(model, first["input_ids"], generator)
        shown = next((each for each in tried if _tried(model, each) is not None), None)
        if shown is not None:
            calls.append(ExampleCall("image in text", Inputs((), shown)))
    step = _cache_step(model, first, output, generator)
    if step is not None:
        calls.append(ExampleCall("cache step", Inputs((), step)))
    return calls


def _image_calls(model: nn.Module, config: Any, first: dict[str, Any]) -> Iterator[ExampleCall]:
    """Yield the calls that vision transformers have beside the plain one: each takes other code.

    A larger image has its positions interpolated, and patches may be masked by a learned token.
    """
    image, patch = first.get("pixel_values"), getattr(config, "patch_size", None)
    if image is None or not isinstance(patch, int) or "input_ids" in first:
        return
    if any(hasattr(module, "interpolate_pos_encoding") for module in model.modules()):
        wider = {**first, "pixel_values": nn.functional.pad(image, (0, patch, 0, patch))}
        if "interpolate_pos_encoding" in forward_arguments(model):
            wider["interpolate_pos_encoding"] = True
        if _tried(model, wider) is not None:
            yield ExampleCall("larger image", Inputs((), wider))
    if any(isinstance(getattr(m, "mask_token", None), nn.Parameter) for m in model.modules()):
        count = (image.shape[-2] // patch) * (image.shape[-1] // patch)
        mask = (torch.arange(count, device=image.device) % 2 == 0)[None]
        masked = {**first, "bool_masked_pos": mask.expand(len(image), -1).clone()}
        if _tried(model, masked) is not None:
            yield ExampleCall("masked patches", Inputs((), masked))


def _token_type_calls(model: nn.Module, first: dict[str, Any]) -> Iterator[ExampleCall]:
    """Yield the call of a decoder that adds an embedding of each token's type: GPT-2's.

    An encoder has types without being asked (BERT).
    """
    text = first.get("input_ids")
    if text is None or "token_type_ids" not in forward_arguments(model):
        return
    if any(hasattr(module, "token_type_embeddings") for module in model.modules()):
        return
    typed = {**first, "token_type_ids": torch.zeros_like(text)}
    if _tried(model, typed) is not None:
        yield ExampleCall("token types", Inputs((), typed))


def refusal_of_known_calls(model: nn.Module) -> str:
    """Return what a model of transformers says to the simplest call of its users.

    "" where it takes it, and for any other model.
    """
    config, kind = getattr(model, "config", None), type(model).__name__
    if config is None or not hasattr(config, "model_type"):
        return ""
    with trial(model) as copied:
        made = InputMaker(copied, config, torch.Generator().manual_seed(0))
        if (first := made.inputs(1)) is None:
            return f"no call of {kind} is known: it takes {made.main}; give example_calls"
        try:
            call(copied, Inputs((), first).clone())
        except Exception as error:  # noqa: BLE001 - a forward may raise anything
            said = one_line(error)
            return f"{kind} refuses the calls that are known of it: {said}; give example_calls"
    return ""


def hidden_states_call(call: ExampleCall) -> ExampleCall:
    """Return the same call with every hidden state asked for: it shows what else changes."""
    keywords = {**call.inputs.kwargs, "output_hidden_states": True}
    return ExampleCall("output_hidden_states=True", Inputs(call.inputs.args, keywords))


def takes_hidden_states(model: nn.Module) -> bool:
    """Return whether the model can be asked for its hidden states."""
    config = getattr(model, "config", None)
    return config is not None and hasattr(config, "output_hidden_states")


def refusal_of(model: nn.Module, call_: ExampleCall) -> str | None:
    """Return what a model says to an example call that it refuses, or None."""
    with trial(model) as copied:
        try:
            call(copied, call_.inputs.clone())
        except Exception as error:  # noqa: BLE001 - a forward may raise anything
            if not _wants_values(error):
                return f"{call_.name}: the model refuses it: {one_line(error)}"
    return None


def _taken(model: nn.Module, keywords: dict[str, Any]) -> bool:
    """Return whether a model takes a call, as far as that shows without values."""
    try:
        call(model, Inputs((), keywords).clone())
    except Exception as error:  # noqa: BLE001 - what a model refuses is not one of its calls
        return _wants_values(error)
    return True


def _wants_values(error: Exception) -> bool:
    """Return whether a forward failed because its tensors have no values: an export asks none."""
    return isinstance(error, RuntimeError) and "cannot be called on meta tensors" in str(error)


def _tried(model: nn.Module, keywords: dict[str, Any]) -> Any:
    """Return what a model makes of a call, None where it refuses it."""
    try:
        return call(model, Inputs((), keywords).clone())
    except Exception as error:  # noqa: BLE001 - what a model refuses is not one of its calls
        return _tried_with_fakes(model, keywords) if _wants_values(error) else None


def _tried_with_fakes(model: nn.Module, keywords: dict[str, Any]) -> Any:
    """Return the same of a model on meta whose forward asks for values, as an export calls it.

    transformers knows a fake tensor from one on meta, and asks it less; what counts what the data
    chose gets a number that is not known.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True)
    fakes = stand_in(Tree(model), mode.from_tensor, mode.from_tensor)
    given = Inputs((), keywords).map(
        lambda leaf: mode.from_tensor(leaf) if isinstance(leaf, torch.Tensor) else leaf
    )
    try:
        with quiet_fakes(), mode:
            made = call(fakes, given)
    except Exception:  # noqa: BLE001 - what a model refuses is not one of its calls
        return None
    return mapped(made, on_meta)


def _cache_step(
    model: nn.Module, first: dict[str, Any], output: Any, generator: torch.Generator
) -> dict[str, Any] | None:
    names = forward_arguments(model)
    name = next((n for n in _CACHES if n in names and getattr(output, n, None) is not None), None)
    if name is None:
        return None
    key = "decoder_input_ids" if "decoder_input_ids" in first else "input_ids"
    if key not in first:
        return None
    ids = first[key]
    order = torch.randperm(ids.shape[1], generator=generator)[:1].to(ids.device)
    step = {**first, key: ids[:, order], name: getattr(output, name)}
    return step if _tried(model, step) is not None else None


def _leaves(inputs: Inputs) -> list[tuple[str, Any]]:
    return list(leaves([inputs.args, dict(inputs.kwargs)]))


def _described(inputs: Inputs) -> list[str]:
    words = [f"{len(inputs.args)} positional"] if inputs.args else []
    return words + list(inputs.kwargs)
