"""Define what a model is for, as losses: everything in the ranking that depends on it.

Every task counts something (tokens, masked tokens, texts) and has outputs for each of them, a divergence of
outputs from the dense model's, and a sampled loss whose gradient has the Fisher information as its second moment. A
divergence alone would not do for that: at the dense model its gradient is zero.

====================  ===========  ==========================  =====================================================
task                  counts       divergence from the dense   labels sampled from the model's own distribution
====================  ===========  ==========================  =====================================================
causal                tokens       KL, nats                    a next token
masked-lm             masked ones  KL, nats                    a token
classification        texts        KL, nats                    a class
embedding             texts        cosine distance             e + r with r ~ N(0, 1): for unit vectors the distance is
                                                               |e - e'|^2 / 2, the negative log-likelihood of N(e, 1);
                                                               the gradient is that of the projection -<r, e>, and its
                                                               second moment the Gauss-Newton matrix of the distance
====================  ===========  ==========================  =====================================================
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from acip_export.model.embedding_similarity import Similarity, compare_similarities
from acip_export.model.encoder import Encoder
from acip_export.model.task import Task as TaskName
from acip_export.model.torch_model import pooled
from acip_export.ranking.losses import next_token_loss, token_cross_entropy, token_divergence
from acip_export.ranking.vocabulary import can_slice, draw, final_hidden, head_alone, token_slices, vocabulary_of

# Of SimCSE's unsupervised training, section 3.
_CONTRAST_TEMPERATURE = 0.05


Look = Callable[[Tensor, Callable[[Tensor], Tensor]], None]


class Task(ABC):
    """What a model is for.

    Attributes:
        name: as artifacts store it. padding: the token that fills windows up, if any does.
        labelled: whether texts bring their own labels, so that a loss needs no dense model to compare with.
    """

    name: ClassVar[TaskName]
    labelled: ClassVar[bool] = False
    padding: int | None = None

    @abstractmethod
    def outputs(self, model: nn.Module, windows: Tensor) -> Tensor:
        """Compute (counted, width): logits in the model's dtype, or embeddings of length one, float32.

        Args:
            windows: (n, length) int64.
        """

    def run_through(self, model: nn.Module, windows: Tensor) -> None:
        """Run all parts of the model, with as little at its end as it can."""
        self.outputs(model, windows)

    @abstractmethod
    def select(self, by_token: Tensor, windows: Tensor) -> Tensor:
        """Pick the rows of a tensor by token (n, length, width) that outputs are made for, (counted, width)."""

    @abstractmethod
    def counted(self, windows: Tensor) -> int:
        """Count what a mean loss is the mean over: tokens, masked tokens or texts."""

    def tokens(self, windows: Tensor) -> int:
        """Count the tokens that are no padding."""
        return windows.numel() if self.padding is None else int((windows != self.padding).sum())

    def trimmed(self, windows: Tensor) -> Tensor:
        """Cut off the columns that are padding in every row."""
        if self.padding is None:
            return windows
        return windows[:, : int((windows != self.padding).sum(1).max())]

    def real(self, windows: Tensor) -> Tensor | None:
        """Tell which tokens are no padding, (n, length) bool; ``None``: all."""
        return None if self.padding is None else windows != self.padding

    def backward_sampled(
        self, model: nn.Module, windows: Tensor, generator: torch.Generator, look: Look | None = None
    ) -> float:
        """Go backward from :meth:`sampled_loss`, and return it.

        Args:
            look: is shown the probabilities over a vocabulary (n, vocabulary), and what picks their rows of a tensor
                by token. The probabilities are overwritten after it.
        """
        outputs = self.outputs(model, windows)
        if look is not None:
            look(outputs.detach().float().softmax(-1), lambda by_token: self.select(by_token, windows))
        loss = self.sampled_loss(outputs, generator)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    def sampled_loss(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Sum the negative log-likelihoods of labels drawn from the model's own distribution."""
        labels = draw(outputs.detach().float().softmax(-1), generator)
        return token_cross_entropy(outputs, labels) * len(outputs)

    def labelled_loss(self, model: nn.Module, windows: Tensor) -> Tensor:
        """Compute a mean loss whose gradient at the dense model is not zero.

        For tasks whose texts bring no labels, it is that of the dense model's own most likely ones.
        """
        outputs = self.outputs(model, windows)
        return token_cross_entropy(outputs, outputs.detach().argmax(-1))

    def divergence(self, outputs: Tensor, dense: Tensor) -> Tensor:
        """Sum the divergences of ``outputs`` from ``dense``; for logits, see :func:`.losses.token_divergence`."""
        return token_divergence(outputs, dense) * len(outputs)

    def similarity(self, outputs: Tensor, dense: Tensor) -> Similarity | None:  # noqa: ARG002
        """Tell how well ``outputs`` keep the similarities of texts that ``dense`` has, where outputs are embeddings."""
        return None


class CausalTask(Task):
    """Predict the next token."""

    name = "causal"
    labelled = True

    def backward_sampled(
        self, model: nn.Module, windows: Tensor, generator: torch.Generator, look: Look | None = None
    ) -> float:
        if not can_slice(model):
            return super().backward_sampled(model, windows, generator, look)
        hidden = final_hidden(model, windows)
        rows = hidden.detach().flatten(0, -2)
        gradient, total = torch.empty_like(rows), 0.0
        with head_alone(model) as logits_of:
            for part in token_slices(len(rows), vocabulary_of(model)):
                leaf = rows[part].clone().requires_grad_()
                logits = logits_of(leaf)
                probabilities = logits.detach().float().softmax(-1)
                labels = draw(probabilities, generator)[:, None]
                total -= float(probabilities.gather(-1, labels).log().sum())
                if look is not None:
                    look(probabilities, lambda by_token: by_token.flatten(0, -2))
                probabilities.scatter_add_(-1, labels, probabilities.new_full(labels.shape, -1))
                logits.backward(probabilities.to(logits.dtype))  # type: ignore[no-untyped-call]
                assert leaf.grad is not None
                gradient[part] = leaf.grad
        hidden.backward(gradient.view_as(hidden))  # type: ignore[no-untyped-call]
        return total

    def run_through(self, model: nn.Module, windows: Tensor) -> None:
        (final_hidden if can_slice(model) else self.outputs)(model, windows)

    def outputs(self, model: nn.Module, windows: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=windows, use_cache=False).logits
        return logits.flatten(0, 1)

    def labelled_loss(self, model: nn.Module, windows: Tensor) -> Tensor:
        return next_token_loss(model, windows)

    def select(self, by_token: Tensor, windows: Tensor) -> Tensor:  # noqa: ARG002 - every token has outputs
        return by_token.flatten(0, -2)

    def counted(self, windows: Tensor) -> int:
        return windows.numel()


class _EncoderTask(Task):
    """Texts padded to one length; attention masks follow from the padding token, which no text contains."""

    def __init__(self, encoder: Encoder, tokens: Mapping[str, int]) -> None:
        self.encoder, self.special_tokens = encoder, tokens
        self.padding = self.pad = tokens["pad"]

    def run(self, model: nn.Module, windows: Tensor) -> Any:
        return model(input_ids=windows, attention_mask=windows.ne(self.pad).long())

    def counted(self, windows: Tensor) -> int:
        return len(windows)


class EmbeddingTask(_EncoderTask):
    """Make one vector of a text."""

    name = "embedding"

    def outputs(self, model: nn.Module, windows: Tensor) -> Tensor:
        assert self.encoder.pooling is not None
        hidden = self.run(model, windows).last_hidden_state
        # Unit length whatever the model does with it: what is compared is the cosine.
        return F.normalize(pooled(hidden, windows.ne(self.pad), self.encoder.pooling).float(), dim=-1)

    def select(self, by_token: Tensor, windows: Tensor) -> Tensor:  # noqa: ARG002
        raise AssertionError("an embedding has no head over tokens")

    def sampled_loss(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(outputs.shape, generator=generator).to(outputs.device)
        return -(outputs * noise).sum()

    def labelled_loss(self, model: nn.Module, windows: Tensor) -> Tensor:
        """Let each text find itself among those of ``windows``: two passes that differ by the model's own dropout,
        contrasted in the batch (SimCSE, arXiv 2104.08821).
        """
        model.train()
        ones, others = self.outputs(model, windows), self.outputs(model, windows)
        model.eval()
        labels = torch.arange(len(ones), device=ones.device)
        return F.cross_entropy(ones @ others.T / _CONTRAST_TEMPERATURE, labels)

    def divergence(self, outputs: Tensor, dense: Tensor) -> Tensor:
        return (1 - (outputs * dense).sum(-1)).sum()

    def similarity(self, outputs: Tensor, dense: Tensor) -> Similarity | None:
        return compare_similarities(outputs.cpu().numpy(), dense.cpu().numpy())


class ClassificationTask(_EncoderTask):
    """Choose a class for a text."""

    name = "classification"

    def outputs(self, model: nn.Module, windows: Tensor) -> Tensor:
        logits: Tensor = self.run(model, windows).logits
        return logits

    def select(self, by_token: Tensor, windows: Tensor) -> Tensor:  # noqa: ARG002
        raise AssertionError("a classifier has no head over tokens")


class MaskedTask(_EncoderTask):
    """Predict masked tokens. The windows hold mask tokens already; their logits are the outputs."""

    name = "masked-lm"

    @property
    def mask_token(self) -> int:
        """The token that stands in for what is to be predicted."""
        return self.special_tokens["mask"]

    def outputs(self, model: nn.Module, windows: Tensor) -> Tensor:
        return self.select(self.run(model, windows).logits, windows)

    def select(self, by_token: Tensor, windows: Tensor) -> Tensor:
        return by_token[windows == self.mask_token]

    def counted(self, windows: Tensor) -> int:
        return int((windows == self.mask_token).sum())


CAUSAL = CausalTask()
ENCODER_TASKS = {task.name: task for task in (EmbeddingTask, ClassificationTask, MaskedTask)}


def task_of(encoder: Encoder | None, tokens: Mapping[str, int]) -> Task:
    """Return the task of a model; of an encoder, ``tokens`` are the ids of its ``pad`` and ``mask`` tokens."""
    return CAUSAL if encoder is None else ENCODER_TASKS[encoder.kind](encoder, tokens)
