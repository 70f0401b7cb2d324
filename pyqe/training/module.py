"""Language model, head and loss as the one module that a Trainer trains."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyqe.heads import SigmoidHead
from pyqe.lm_head import LMHead, capture_hidden
from pyqe.losses import SigmoidHeadLoss
from pyqe.training.parallel import processes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_EVAL_SEED = 0


class TrainingModule(nn.Module):
    """Computes the loss of a batch; the head's parameters are the only ones.

    Args:
        lm: the language model, which is not trained, not saved and not registered as a submodule.
        head: the head to train.
        loss: the loss.

    Raises:
        HeadMismatchError: the head belongs to another vocabulary or hidden size.
    """

    def __init__(self, lm: PreTrainedModel, head: SigmoidHead, loss: SigmoidHeadLoss) -> None:
        super().__init__()
        self.head = head.requires_grad_(True)
        self.loss = loss
        self._frozen = (lm.eval(), LMHead.from_model(lm))  # in a tuple: nn.Module does not look inside
        head.check_compatible(self._frozen[1])
        self.restart_evaluation()

    def restart_evaluation(self) -> None:
        """Start the evaluation's negatives anew, so that every evaluation meets the same ones."""
        self._eval_generator = torch.Generator().manual_seed(_EVAL_SEED + processes()[0])

    def _generator(self) -> torch.Generator | None:
        """Of the negatives: torch's own, but where several processes share a seed each has numbers of its own."""
        if not self.training:
            return self._eval_generator
        rank, count = processes()
        return torch.Generator().manual_seed(int(torch.randint(2**31, ())) + rank) if count > 1 else None

    def forward(
        self,
        labels: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        hidden: Tensor | None = None,
        logsumexp: Tensor | None = None,
        token_labels: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Loss of a batch of tokens or of cached hidden states.

        Args:
            labels: int64 [B, L], -100 where there is nothing to learn. With ``input_ids`` of a causal LM they are the
                same tokens, shifted here as transformers does; with ``hidden``, ``labels`` i is what state i predicts.
            input_ids: int64 [B, L].
            attention_mask: [B, L].
            hidden: [B, L, D] cached hidden states, in place of ``input_ids``.
            logsumexp: [B, L] of the LM at those.
            token_labels: [B, L] of 1 (right), 0 (wrong), -1 (skip), aligned with ``labels``.
            weights: [B, L] factors, aligned with ``labels``.

        Returns:
            ``{"loss": scalar}``.
        """
        lm, lm_head = self._frozen
        if hidden is None:
            hidden = self._hidden(input_ids, attention_mask, labels)
            if not lm.config.is_encoder_decoder:
                hidden = hidden[:, :-1]
                labels, token_labels, weights = (_shift(x) for x in (labels, token_labels, weights))  # type: ignore[assignment]
        with torch.autocast(hidden.device.type, enabled=False):  # the head computes in float32
            loss = self.loss(
                self.head,
                hidden.reshape(-1, hidden.shape[-1]),
                *(labels.reshape(-1), lm_head),
                labels=None if token_labels is None else token_labels.reshape(-1),
                weights=None if weights is None else weights.reshape(-1),
                logsumexp=None if logsumexp is None else logsumexp.reshape(-1),
                generator=self._generator(),
            )
        return {"loss": loss}

    @torch.no_grad()
    def _hidden(self, input_ids: Tensor | None, attention_mask: Tensor | None, labels: Tensor) -> Tensor:
        lm, _ = self._frozen
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if attention_mask is not None and "position_ids" in inspect.signature(lm.forward).parameters:
            inputs["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)  # right with padding on either side
        if lm.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = lm.prepare_decoder_input_ids_from_labels(labels)
        with capture_hidden(lm, skip_logits=True) as captured:
            lm(**inputs, use_cache=False)
        return captured[0]


def _shift(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor[:, 1:]
