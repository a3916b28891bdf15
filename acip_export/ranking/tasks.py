"""What a model is for, as losses: everything in the ranking that depends on it.

Every task has outputs by *unit* (a token, a masked token, a text), a divergence of outputs from the dense model's, and
a sampled loss whose gradient has the Fisher information as its second moment. A divergence alone would not do for that:
at the dense model its gradient is zero.

====================  ===========  ==========================  =====================================================
task                  unit         divergence from the dense   labels sampled from the model's own distribution
====================  ===========  ==========================  =====================================================
causal                token        KL, nats                    a next token
masked LM             masked token KL, nats                    a token
classification        text         KL, nats                    a class
sentence embedding    text         cosine distance             e + r with r ~ N(0, 1): for unit vectors the distance is
                                                               |e - e'|^2 / 2, the negative log-likelihood of N(e, 1);
                                                               the gradient is that of the projection -<r, e>, and its
                                                               second moment the Gauss-Newton matrix of the distance
====================  ===========  ==========================  =====================================================
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from acip_export.model.encoder import Encoder
from acip_export.model.task import Task as TaskName
from acip_export.model.torch_model import pooled
from acip_export.ranking.losses import next_token_loss, token_cross_entropy, token_divergence

# Of SimCSE's unsupervised training, section 3.
_CONTRAST_TEMPERATURE = 0.05


class Task(ABC):
    """Attributes: ``name``: as artifacts store it; ``padding``: the token that fills windows up, if any does."""

    name: ClassVar[TaskName]
    padding: int | None = None

    @abstractmethod
    def outputs(self, model: nn.Module, windows: Tensor) -> Tensor:
        """(units, width): logits in the model's dtype, or unit embeddings, float32. ``windows`` (n, length) int64."""

    @abstractmethod
    def select(self, by_token: Tensor, windows: Tensor) -> Tensor:
        """Rows of a tensor by token (n, length, width) that belong to units, (units, width)."""

    @abstractmethod
    def units(self, windows: Tensor) -> int: ...

    def tokens(self, windows: Tensor) -> int:
        return windows.numel() if self.padding is None else int((windows != self.padding).sum())

    def trimmed(self, windows: Tensor) -> Tensor:
        """Without the columns that are padding in every row."""
        if self.padding is None:
            return windows
        return windows[:, : int((windows != self.padding).sum(1).max())]

    def real(self, windows: Tensor) -> Tensor | None:
        """Which tokens are no padding, (n, length) bool; ``None``: all."""
        return None if self.padding is None else windows != self.padding

    def sampled_loss(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Negative log-likelihood of labels drawn from the model's own distribution, summed over units."""
        labels = torch.multinomial(outputs.detach().float().softmax(-1).cpu(), 1, generator=generator).squeeze(1)
        return token_cross_entropy(outputs, labels.to(outputs.device)) * len(outputs)

    def labelled_loss(self, model: nn.Module, windows: Tensor) -> Tensor:
        """A loss whose gradient at the dense model is not zero, mean over units; for tasks whose texts bring no labels,
        against the dense model's own most likely ones.
        """
        outputs = self.outputs(model, windows)
        return token_cross_entropy(outputs, outputs.detach().argmax(-1))

    def divergence(self, outputs: Tensor, dense: Tensor) -> Tensor:
        """From ``dense`` to ``outputs``, summed over units; for logits, see :func:`.losses.token_divergence`."""
        return token_divergence(outputs, dense) * len(outputs)


class CausalTask(Task):
    name = "causal"

    def outputs(self, model: nn.Module, windows: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=windows, use_cache=False).logits
        return logits.flatten(0, 1)

    def labelled_loss(self, model: nn.Module, windows: Tensor) -> Tensor:
        return next_token_loss(model, windows)

    def select(self, by_token: Tensor, windows: Tensor) -> Tensor:  # noqa: ARG002 - every token is a unit
        return by_token.flatten(0, -2)

    def units(self, windows: Tensor) -> int:
        return windows.numel()


class _EncoderTask(Task):
    """Texts padded to one length; attention masks follow from the padding token, which no text contains."""

    def __init__(self, padding: int) -> None:
        self.padding = self.pad = padding

    def run(self, model: nn.Module, windows: Tensor) -> Any:
        return model(input_ids=windows, attention_mask=windows.ne(self.pad).long())

    def units(self, windows: Tensor) -> int:
        return len(windows)


class EmbeddingTask(_EncoderTask):
    name = "embedding"

    def __init__(self, padding: int, encoder: Encoder) -> None:
        super().__init__(padding)
        assert encoder.pooling is not None
        self.pooling = encoder.pooling

    def outputs(self, model: nn.Module, windows: Tensor) -> Tensor:
        hidden = self.run(model, windows).last_hidden_state
        # Unit length whatever the model does with it: what is compared is the cosine.
        return F.normalize(pooled(hidden, windows.ne(self.pad), self.pooling).float(), dim=-1)

    def select(self, by_token: Tensor, windows: Tensor) -> Tensor:  # noqa: ARG002
        raise AssertionError("an embedding has no head over tokens")

    def sampled_loss(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(outputs.shape, generator=generator).to(outputs.device)
        return -(outputs * noise).sum()

    def labelled_loss(self, model: nn.Module, windows: Tensor) -> Tensor:
        """Each text is to find itself among those of ``windows``: two passes that differ by the model's own dropout,
        contrasted in the batch (SimCSE, arXiv 2104.08821).
        """
        model.train()
        ones, others = self.outputs(model, windows), self.outputs(model, windows)
        model.eval()
        labels = torch.arange(len(ones), device=ones.device)
        return F.cross_entropy(ones @ others.T / _CONTRAST_TEMPERATURE, labels)

    def divergence(self, outputs: Tensor, dense: Tensor) -> Tensor:
        return (1 - (outputs * dense).sum(-1)).sum()


class ClassificationTask(_EncoderTask):
    name = "classification"

    def outputs(self, model: nn.Module, windows: Tensor) -> Tensor:
        logits: Tensor = self.run(model, windows).logits
        return logits

    def select(self, by_token: Tensor, windows: Tensor) -> Tensor:  # noqa: ARG002
        raise AssertionError("a classifier has no head over tokens")


class MaskedTask(_EncoderTask):
    """The windows hold mask tokens already; their logits are the outputs."""

    name = "masked-lm"

    def __init__(self, padding: int, mask_token: int) -> None:
        super().__init__(padding)
        self.mask_token = mask_token

    def outputs(self, model: nn.Module, windows: Tensor) -> Tensor:
        return self.select(self.run(model, windows).logits, windows)

    def select(self, by_token: Tensor, windows: Tensor) -> Tensor:
        return by_token[windows == self.mask_token]

    def units(self, windows: Tensor) -> int:
        return int((windows == self.mask_token).sum())


CAUSAL = CausalTask()


def task_of(encoder: Encoder | None, tokens: Mapping[str, int]) -> Task:
    """The task of a model. ``tokens``: ids of the tokenizer's ``pad`` and ``mask`` tokens, for encoders."""
    if encoder is None:
        return CAUSAL
    if encoder.kind == "embedding":
        return EmbeddingTask(tokens["pad"], encoder)
    if encoder.kind == "classification":
        return ClassificationTask(tokens["pad"])
    return MaskedTask(tokens["pad"], tokens["mask"])
