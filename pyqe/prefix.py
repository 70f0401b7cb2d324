"""What many inputs begin with, read by the model once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from pyqe.lm_head import capture_hidden

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class _FixedLayer(DynamicLayer):  # type: ignore[misc]
    """Gives its keys and values before the new ones and keeps none of those, so that it serves batch after batch."""

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.keys, self.values = layer.keys, layer.values

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keys and values [B, heads, P + L, size] of the prefix (P) and of the new tokens (L) of B rows."""
        return _joined(self.keys, key_states), _joined(self.values, value_states)


def _joined(shared: Tensor, new: Tensor) -> Tensor:
    return torch.cat([shared.expand(len(new), -1, -1, -1), new], dim=-2)


class SharedPrefix:
    """Keys and values of the tokens that inputs have in common, from one forward pass over them alone.

    Attributes:
        token_ids: those tokens.
    """

    def __init__(self, token_ids: Sequence[int], cache: DynamicCache) -> None:
        self.token_ids = list(token_ids)
        self._cache = DynamicCache()
        self._cache.layers = [_FixedLayer(layer) for layer in cache.layers]

    @classmethod
    def compute(cls, model: PreTrainedModel, token_ids: Sequence[int]) -> SharedPrefix | None:
        """Run a decoder-only model, in evaluation mode, over the tokens.

        Returns:
            None where the model keeps something else than keys and values of each token (recurrent layers), or where
            these depend on what comes later.
        """
        config = model.config.get_text_config(decoder=True)
        if getattr(model, "_is_stateful", False) or _rotates_by_length(config) or not _attends_alone(config):
            return None
        cache = DynamicCache()  # without the config: layers with a sliding window keep every key here as well
        ids = torch.tensor([list(token_ids)], device=model.get_output_embeddings().weight.device)
        with capture_hidden(model, skip_logits=True):
            model(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True)
        filled = [layer.is_initialized and layer.keys.shape[-2] == ids.shape[1] for layer in cache.layers]
        return cls(token_ids, cache) if filled and all(filled) else None

    def inputs(self, mask: Tensor) -> dict[str, Any]:
        """Arguments of the model for rows that stand after the prefix, whose own mask is ``mask`` [B, L]."""
        before = mask.new_ones(len(mask), len(self.token_ids))
        return {
            "attention_mask": torch.cat([before, mask], dim=1),
            "past_key_values": self._cache,
            "use_cache": True,
        }


def _attends_alone(config: PreTrainedConfig) -> bool:
    """Whether every layer keeps keys and values and nothing else."""
    layers = DynamicCache(config=config).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def _rotates_by_length(config: PreTrainedConfig) -> bool:
    """Whether the rotary frequencies, and so a prefix's keys, change with the length of the whole input."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters, *(part for part in parameters.values() if isinstance(part, dict))]
    return any(kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds)
