"""Forward passes that start in the middle of the model, with no copy of any `forward`.

The model's own code runs as it is: it embeds the tokens, makes its masks and rotary tables,
and loops over its layers. Layers before the start only hand on a hidden state that was
computed before, so the pass costs what the remaining layers cost.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from rap_env.llm.elastic import ElasticLLM

Forward = Callable[..., Any]


@contextlib.contextmanager
def _replaced_forwards(replacements: list[tuple[nn.Module, Forward]]) -> Iterator[None]:
    """Give some modules another `forward` for a while, as instance attributes."""
    try:
        for module, forward in replacements:
            module.forward = forward
        yield
    finally:
        for module, _ in replacements:
            module.__dict__.pop("forward", None)


class PartialForward:
    """Runs the decoder of a live model from a given layer on, and its head on what comes out.

    Shapes: B sequences, T tokens, H hidden width, V vocabulary, L layers. The mask in force is the
    model's own (`ElasticLLM.masked`); nothing here changes it.

    Args:
        llm: The live model.
    """

    def __init__(self, llm: ElasticLLM) -> None:
        self._model = llm.model
        self._cap = getattr(llm.adapter.config, "final_logit_softcapping", None)
        self._decoder = llm.adapter.decoder(llm.model)
        self._layers = list(llm.adapter.layers(llm.model))

    @property
    def num_layers(self) -> int:
        """L, the number of decoder layers."""
        return len(self._layers)

    @torch.inference_mode()
    def run(
        self,
        input_ids: torch.Tensor,
        start_layer: int = 0,
        start_state: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Run layers `start_layer` to L - 1 and the last norm.

        Args:
            input_ids: Tokens without padding, shape (B, T).
            start_layer: First layer that is computed; L computes only the last norm.
            start_state: Hidden state that enters `start_layer`, shape (B, T, H); needed if
                `start_layer` is above 0.

        Returns:
            The decoder's output, shape (B, T, H), and the hidden states by the layer that
            they enter, for layers above `start_layer` (L: what leaves the last layer).
        """
        states: dict[int, torch.Tensor] = {}
        skipped = [(layer, lambda *_, **__: start_state) for layer in self._layers[:start_layer]]
        with contextlib.ExitStack() as stack:
            for number, layer in enumerate(self._layers[start_layer:], start=start_layer):
                handle = layer.register_forward_hook(_keep(states, number + 1))
                stack.callback(handle.remove)
            stack.enter_context(_replaced_forwards(skipped))
            output = self._decoder(input_ids=input_ids, use_cache=False)
        return output.last_hidden_state, states

    @torch.inference_mode()
    def each_layer(
        self, input_ids: torch.Tensor, states: dict[int, torch.Tensor]
    ) -> dict[int, torch.Tensor]:
        """Run every layer under the current mask, each on a given input of its own.

        Args:
            input_ids: Tokens without padding, shape (B, T).
            states: What enters each layer, shape (B, T, H), as `run` returned it.

        Returns:
            What leaves each layer, (B, T, H), by the number of the next one.
        """
        outputs: dict[int, torch.Tensor] = {}
        with contextlib.ExitStack() as stack:
            for number, layer in enumerate(self._layers):
                hooks = [layer.register_forward_hook(_keep(outputs, number + 1))]
                if number in states:
                    hook = _feed(states[number])
                    hooks.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
                for handle in hooks:
                    stack.callback(handle.remove)
            self._decoder(input_ids=input_ids, use_cache=False)
        return outputs

    @torch.inference_mode()
    def embedded(self, input_ids: torch.Tensor) -> torch.Tensor:
        """What enters the first layer, (B, T) -> (B, T, H)."""
        entered: list[torch.Tensor] = []

        def keep(_module: nn.Module, args: Any, kwargs: Any) -> None:
            entered.append(args[0] if args else kwargs["hidden_states"])

        handle = self._layers[0].register_forward_pre_hook(keep, with_kwargs=True)
        try:
            self._decoder(input_ids=input_ids, use_cache=False)
        finally:
            handle.remove()
        return entered[0]

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The model's head on decoder outputs, (B, T, H) -> (B, T, V).

        The one thing that a family's `forward` does to logits is Gemma's soft cap.
        """
        logits: torch.Tensor = self._model.get_output_embeddings()(hidden)
        return logits if self._cap is None else torch.tanh(logits / self._cap) * self._cap


def _keep(states: dict[int, torch.Tensor], layer: int) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        states[layer] = output[0] if isinstance(output, tuple) else output

    return hook


def _feed(state: torch.Tensor) -> Callable[[nn.Module, Any, Any], tuple[Any, Any]]:
    def hook(_module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if args:
            return (state, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": state}

    return hook
