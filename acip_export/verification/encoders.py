"""Encoders in their runtimes: vectors of texts against the bundle's, and similarities against the dense model's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from acip_export.artifacts.materialized import MaterializedModel, load_materialized
from acip_export.artifacts.plan import Plan, Serving
from acip_export.artifacts.report import Agreement
from acip_export.formats.protocol import ExportFormat, SessionClass
from acip_export.formats.session import EncoderSession, Vectors, Windows
from acip_export.io.kept_states import KeptStates
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.embedding_similarity import Similarity, compare_similarities
from acip_export.model.encoder import Encoder
from acip_export.text.packing import load_tokenizer
from acip_export.verification.metrics import finite, log_softmax
from acip_export.verification.sentences import SENTENCES
from acip_export.verification.unfinished import Unfinished, digest_of

# The bundle is rounded as the export is; what is left is the rounding of activations to eight bits. Ten times what was
# measured on a trained encoder; a tensor in the wrong place costs some tenths.
_ROUNDED_DISTANCE = 0.02
_MOST_TEXTS = 256
# That are computed between two moments at which vectors are kept.
_TOGETHER = 16


@dataclass(frozen=True)
class EncoderFigures:
    """What one runtime's export of an encoder is like.

    Attributes:
        runtime: name and version. agreement: with the bundle, ``positions`` texts; ``mean_kl`` is the mean cosine
            distance for embeddings, and nothing is generated; ``None`` where outputs are no finite numbers.
        similarity: against the dense model, for embeddings with enough texts; else ``None``.
        failures: one sentence for each check that did not hold.
    """

    runtime: str
    agreement: Agreement | None
    similarity: Similarity | None
    failures: tuple[str, ...]


def verify_encoder(
    export: Path,
    model: MaterializedModel,
    encoder: Encoder,
    export_format: ExportFormat,
    session_class: SessionClass,
    dense: Path | None,
    text: Windows | None,
    unfinished: Unfinished,
    hashes: Mapping[str, str],
) -> EncoderFigures:
    """Open the export in its runtime and compare.

    Args:
        unfinished: keeps the vectors that are computed. hashes: SHA-256 of the export's files.
        dense: the base model, for similarities.
        text: held-out texts, (n, length) padded token ids; ``None``: a few sentences of our own.

    Raises:
        MissingExtraError: the runtime is not installed. VerificationError: it refuses the export.
    """
    plan = model.plan
    texts = _tokens(model.path, encoder, plan.serving, text)
    of_texts = digest_of(np.array(tokens, np.int64) for tokens in texts)
    session: EncoderSession
    with session_class.open(export, plan.serving) as session:
        runtime = session.name
        origin = f"{sorted(hashes.items())} {runtime} {of_texts}"
        found = _kept(session.outputs, texts, unfinished.states("vectors of the export", origin, "text"))
    of_bundle = unfinished.states("vectors of the bundle", of_texts, "text")
    reference = _kept(_computed(lambda: load_materialized(model, export_format.round_trip), encoder), texts, of_bundle)
    agreement = _agreement(encoder, reference, found)
    similarity = None
    if encoder.kind == "embedding" and dense is not None:
        import torch

        from acip_export.model.torch_model import load_dense

        checkpoint = Checkpoint.open(dense)
        origin = f"{checkpoint.fingerprint} {of_texts}"
        states = unfinished.states("vectors of the dense model", origin, "text")
        of_dense = _kept(_computed(lambda: load_dense(checkpoint, torch.float32), encoder), texts, states)
        similarity = compare_similarities(found, of_dense)
    return EncoderFigures(runtime, finite(agreement), similarity, _failures(export_format, plan, runtime, agreement))


def _kept(outputs: Callable[[Sequence[list[int]]], Vectors], texts: Sequence[list[int]], kept: KeptStates) -> Vectors:
    """Return the vectors of all texts; ``kept``, read and filled, has those of the first ones."""
    import torch

    rows = [kept.restored()["vectors"].numpy()] if kept.blocks else []
    for start in range(kept.blocks, len(texts), _TOGETHER):
        rows.append(outputs(texts[start : start + _TOGETHER]))
        vectors = np.concatenate(rows)
        kept.passed(len(vectors), {"vectors": torch.from_numpy(vectors)})
    return np.concatenate(rows)


def _computed(load: Callable[[], Any], encoder: Encoder) -> Callable[[Sequence[list[int]]], Vectors]:
    """Return what computes vectors in PyTorch, by a model that is loaded for the first of them."""
    loaded = functools.cache(load)
    return lambda texts: _outputs(loaded(), encoder, texts)


def _outputs(model: Any, encoder: Encoder, texts: Sequence[list[int]]) -> Vectors:
    """Compute in PyTorch what :meth:`EncoderSession.outputs` returns."""
    import torch

    from acip_export.model.torch_model import pooled

    rows = []
    with torch.no_grad():
        for tokens in texts:
            ids = torch.tensor([tokens])
            output = model(input_ids=ids)
            if encoder.pooling is not None:
                row = pooled(output.last_hidden_state, torch.ones_like(ids, dtype=torch.bool), encoder.pooling)[0]
            elif encoder.kind == "classification":
                row = output.logits[0]
            else:
                row = output.logits[0].mean(0)
            rows.append(row.float())
        vectors: Vectors = torch.stack(rows).numpy()
    return vectors


def _tokens(model: Path, encoder: Encoder, serving: Serving, text: Windows | None) -> list[list[int]]:
    tokenizer = load_tokenizer(model)
    if text is None:
        length = min(encoder.max_length, serving.context)
        ids: list[list[int]] = tokenizer(list(SENTENCES), truncation=True, max_length=length)["input_ids"]
        return ids
    return [[int(token) for token in row[row != tokenizer.pad_token_id]] for row in text[:_MOST_TEXTS]]


def _agreement(encoder: Encoder, reference: Vectors, found: Vectors) -> Agreement:
    """See :class:`EncoderFigures`; embeddings are compared at unit length, which is all that a runtime promises."""
    if encoder.kind == "embedding":
        reference, found = (v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-12) for v in (reference, found))
        distance = float(1 - (reference * found).sum(1).mean())
        same = np.ones(1)
    else:
        log_a, log_b = log_softmax(reference), log_softmax(found)
        distance = float((np.exp(log_a) * (log_a - log_b)).sum(1).mean())
        same = reference.argmax(1) == found.argmax(1)
    difference = float(np.abs(reference - found).max())
    return Agreement(len(reference), difference, max(0.0, distance), float(same.mean()), 0, 0)


def _failures(export_format: ExportFormat, plan: Plan, runtime: str, agreement: Agreement) -> tuple[str, ...]:
    if export_format.is_exact(plan):
        tolerance = export_format.float_tolerance
        if not agreement.max_logit_difference <= tolerance:
            found = f"{agreement.max_logit_difference:.2e}, at most {tolerance} allowed"
            return (f"{runtime}: outputs differ by {found}",)
    elif not agreement.mean_kl <= _ROUNDED_DISTANCE:
        found = f"{agreement.mean_kl:.4f}, at most {_ROUNDED_DISTANCE} allowed"
        return (f"{runtime}: the mean distance of outputs from the bundle's is {found}",)
    return ()
