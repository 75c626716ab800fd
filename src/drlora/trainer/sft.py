"""Supervised fine-tuning: TRL's SFTTrainer, with a loss that costs no more than the model's own.

TRL forms the loss in an LM head of its own, which computes log-probabilities in chunks and never
holds all logits, and computes each token's entropy and whether it was the likeliest with it. On a
CPU that head takes three times as long as the model's own. So there are four ways to the same
loss:

    model   the logits of the model, as transformers' Trainer: on a CPU
    targets the same products at the targets alone, in chunks (`drlora.evaluation.head`): on a CPU,
            where the vocabulary is large and the model's head and loss are plain ones
    fused   TRL's head, without entropy and accuracy: where it has kernels
    trl     TRL's own computation as it is: where its metrics are asked for, and where the loss is
            another than the likelihood (loss_type=dft, a router's auxiliary loss)
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from types import MethodType
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers import Trainer
from transformers.modeling_outputs import CausalLMOutputWithPast
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from drlora.distributed.zero import lacks_engine, shape_of
from drlora.evaluation.head import has_plain_head, losses_at_targets
from drlora.trainer.documents import apart, can_attend_apart
from drlora.trainer.trainer import RunTrainer

FUSED_DEVICES = ("cuda", "xpu")  # where TRL's head runs in Triton
Way = Literal["model", "targets", "fused", "trl"]
# What asks the model's forward for its loss in that way.
_FLAGS = {"fused": "fused_lm_head", "targets": "loss_of_targets"}


class SftTrainer(RunTrainer, SFTTrainer):
    """TRL's SFTTrainer as `drlora train` uses it; its data are token ids and labels already.

    Args:
        token_metrics: whether entropy and accuracy of the tokens are computed and logged, as TRL
            does; the loss is then TRL's too, bit for bit.

    Attributes:
        way: how the loss is computed, see above.
        attends_apart: whether documents of a packed row attend apart (`drlora.trainer.documents`).
    """

    def __init__(self, *args: Any, token_metrics: bool = False, **kwargs: Any) -> None:
        base = kwargs["model"].get_base_model()
        forward = vars(base).get("forward")  # accelerate's, where the model is on several devices
        super().__init__(*args, **kwargs)
        self.attends_apart = bool(self.padding_free) and can_attend_apart(
            self._adapted, self.data_collator
        )
        patched = base.forward  # TRL's head
        del base.forward
        if forward is not None:
            base.forward = forward
        self.way: Way = self._choose_way(token_metrics, base)
        if self.way == "trl":
            base.forward = patched
        if self.way == "fused":
            add_fused_lm_head(base)
        if self.way == "targets":
            _add_loss_of_targets(base)

    def _choose_way(self, token_metrics: bool, base: Any) -> Way:
        assert isinstance(self.args, SFTConfig)
        parallel = self.accelerator.parallelism_config
        is_split = parallel is not None and parallel.sp_enabled
        if token_metrics or self.aux_loss_enabled or self.args.loss_type != "nll" or is_split:
            return "trl"
        if self.label_smoother is not None:
            return "model"
        if self.args.device.type in FUSED_DEVICES:
            return "fused"
        # Elsewhere the head may be in parts, or its hooks those of a wrapper around the model.
        is_whole = not (self.is_fsdp_enabled or self.is_deepspeed_enabled or parallel is not None)
        is_own = "forward" not in vars(base) and not self.args.torch_compile
        return "targets" if is_whole and is_own and has_plain_head(base) else "model"

    def training_step(
        self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """A step, forwards and backwards; documents attend apart in both."""
        with self._attention(inputs):
            return super().training_step(model, inputs, *args, **kwargs)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Loss of held-out examples."""
        with self._attention(inputs):
            return super().prediction_step(model, inputs, *args, **kwargs)

    def _attention(self, inputs: dict[str, Any]) -> AbstractContextManager[None]:
        is_row = self.attends_apart and "position_ids" in inputs
        return apart(self._adapted) if is_row else nullcontext()

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Mean negative log-likelihood over the labels of the step, 0 without any; a scalar."""
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.clamp(min=1)
        elif num_items_in_batch is not None:
            num_items_in_batch = max(1, num_items_in_batch)
        if self.way == "trl":
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.way in _FLAGS:
            inputs = {**inputs, _FLAGS[self.way]: True}
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)


def _add_loss_of_targets(base: Any) -> None:
    """Let `base(..., labels=..., loss_of_targets=True)` give the loss without logits.

    In the model's forward, as TRL's head, so that what wraps the model wraps it too.
    """
    plain = type(base).forward

    @functools.wraps(plain)  # `generate` looks at the arguments
    def forward(
        self: Any,
        *args: Any,
        loss_of_targets: bool = False,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **inputs: Any,
    ) -> Any:
        if not loss_of_targets or labels is None:
            given = {"labels": labels, "num_items_in_batch": num_items_in_batch}
            known = {name: value for name, value in given.items() if value is not None}
            return plain(self, *args, **known, **inputs)
        inputs.update(zip(("input_ids", "attention_mask"), args, strict=False))
        losses_N = losses_at_targets(self, labels, **inputs)
        count = len(losses_N) if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutputWithPast(loss=cast(Any, losses_N.sum() / count))

    base.forward = MethodType(forward, base)


def sees_other_documents(model: Any, collator: Any) -> bool:
    """Whether a document in a packed row is changed by the one before it.

    Attention implementations read where a document begins from its positions, from cumulative
    lengths, or not at all; models with linear attention or state spaces need more. So it is tried:
    two rows that differ in their first document only. What the second document's logits move by is
    compared with what they move by in one row without a border, where they are meant to.

    Args:
        model: a causal language model.
        collator: of the trainer; makes a packed row of examples.
    """
    # On paper there are no weights, and under ZeRO-3 they lie apart until its engine is there.
    if model.device.type == "meta" or lacks_engine(model.parameters()):
        return False
    size = shape_of(model.get_input_embeddings().weight)[0]
    length = 8
    tokens = torch.arange(3 * length) % max(1, size - 3) + min(3, size - 1)
    first, other, second = tokens.split(length)

    def logits_of(documents: list[Tensor]) -> Tensor:
        """Of the last document, (L, V)."""
        examples = [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in documents]
        batch = {
            name: value.to(model.device) if isinstance(value, Tensor) else value
            for name, value in collator(examples).items()
        }
        del batch["labels"]
        with torch.no_grad():
            return model(**batch, use_cache=False).logits[0, -length:].float()

    was_training = model.training
    model.eval()
    apart = logits_of([first, second]) - logits_of([other, second])
    joined = logits_of([torch.cat([first, second])]) - logits_of([torch.cat([other, second])])
    model.train(was_training)
    return bool(apart.norm() > joined.norm() / 10)
