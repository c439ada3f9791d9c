"""The ``eval`` subcommand: loss and bits per byte of finished weights on a text, in one process, without DeepSpeed.

Documents are seen as they are: each begins with an empty state and none sees another, whatever its length. A document
longer than ``sequence_length`` is cut into pieces of that many tokens; a piece does not see the ones before it, but
its last token still predicts the first of the next. So every token but a document's first is predicted exactly once.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from qwen3next_train.batch import PackedBatch
from qwen3next_train.checkpoint.weights import NO_TOKENIZER, Weights, weights_of_checkpoint
from qwen3next_train.config.schema import Config, SourceConfig
from qwen3next_train.data.documents import Document, read_documents
from qwen3next_train.data.left_out import LeftOuts
from qwen3next_train.data.prepare import log_left_out, log_passed_over, prepare_evaluation
from qwen3next_train.data.prepared import PreparedSource
from qwen3next_train.data.rows import read_tokens
from qwen3next_train.data.sources import FileSource, StoreSource, resolve
from qwen3next_train.data.store_writer import StoreWriter, storage_errors
from qwen3next_train.data.token_store import DocumentRange, token_dtype
from qwen3next_train.errors import ConfigError, DataError, DivergedError, ExitCode
from qwen3next_train.huggingface.weights import weights_of_hf
from qwen3next_train.kernels.selection import DTYPES
from qwen3next_train.model.qwen3_next import Qwen3NextForCausalLM
from qwen3next_train.parallel.process_groups import select_device
from qwen3next_train.train.finished_model import Progress, load_model

_BATCH_TOKENS = 8192
_WINDOW_TOKENS = 1 << 22


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Args:
        loss: mean over the predicted tokens of their negative log likelihood, in nats.
        bpb: bits per UTF-8 byte of the text, as if the tokens that nothing predicts cost the mean; None when the
            number of bytes is unknown.
        num_tokens: predicted tokens.
    """

    loss: float
    bpb: float | None
    num_tokens: int


def evaluate_command(
    *,
    checkpoint: Path | None,
    hf: Path | None,
    data: str,
    as_json: bool,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    precision: Literal["bf16", "fp32"] | None = None,
    sequence_length: int | None = None,
    tokenizer: str | None = None,
    text_field: str = "text",
) -> int:
    """Evaluate weights on a text and print one line, or with ``as_json`` an object ``{loss, bpb, num_tokens}``.

    Args:
        checkpoint: a checkpoint of ours, or a run directory: its newest intact one.
        hf: a Hugging Face folder; give this or ``checkpoint``.
        data: a text file, a token store's prefix, JSON lines with ``text`` or ``input_ids``, or what else
            ``data.sources`` takes.
        as_json: print JSON.
        device: where to run; auto takes CUDA when present.
        precision: dtype of weights and activations; None: bf16 on CUDA, fp32 on the CPU.
        sequence_length: tokens a document's piece may have; None: that of the run, for a folder the smaller of 4096
            and its ``max_position_embeddings``.
        tokenizer: as ``data.tokenizer``; None takes the model's own.
        text_field: JSON key or column that holds the text.

    Returns:
        The exit code, 0.

    Raises:
        ConfigError: not one model given, an unusable device or tokenizer.
        CheckpointError: the checkpoint is damaged.
        DataError: the Hugging Face folder or the data is damaged, or there is nothing to predict.
        DivergedError: the loss is not finite.
    """
    if (checkpoint is None) == (hf is None):
        raise ConfigError("eval: give either --checkpoint or --hf, the model to evaluate")
    if sequence_length is not None and sequence_length < 1:
        raise ConfigError(f"eval: {sequence_length} tokens a sequence; give at least 1")
    target = select_device(device, 0, setting="--device")
    dtype = DTYPES[precision or ("bf16" if target.type == "cuda" else "fp32")]
    source = SourceConfig(source=data, text_field=text_field)
    # Before every byte of the weights is verified.
    resolved = resolve(source)
    weights = weights_of_checkpoint(checkpoint) if checkpoint is not None else weights_of_hf(Path(hf or ""))
    config = _config(weights, sequence_length=sequence_length, tokenizer=tokenizer)
    with ExitStack() as stack:
        prepared = _prepare(config, source, resolved, stack)
        try:
            model = load_model(weights, device=target, dtype=dtype, command="eval")
            evaluation = evaluate(model, prepared, sequence_length=config.data.sequence_length, device=target)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"eval: {weights.path}: out of memory on {target}; use precision bf16, a shorter sequence or the CPU"
            ) from error
    if as_json:
        result = {"loss": evaluation.loss, "bpb": evaluation.bpb, "num_tokens": evaluation.num_tokens}
        print(json.dumps(result, allow_nan=False))
    else:
        bpb = "bytes unknown" if evaluation.bpb is None else f"{evaluation.bpb:.4f} bits per byte"
        print(f"{data}: loss {evaluation.loss:.4f} nats per token, {bpb}, {evaluation.num_tokens:,} tokens")
    return ExitCode.FINISHED


def evaluate(
    model: Qwen3NextForCausalLM, source: PreparedSource, *, sequence_length: int, device: torch.device
) -> Evaluation:
    """Evaluate a model on all documents of a source.

    Args:
        model: on ``device``.
        source: the documents.
        sequence_length: tokens a piece may have.
        device: where to run.

    Raises:
        DataError: a token is not in the vocabulary, or no document has two tokens.
        DivergedError: the loss is not finite.
    """
    documents = source.documents
    total, num_targets = 0.0, 0
    report = Progress(f"eval: {source.label}, tokens", documents.num_tokens)
    pieces = _pieces(documents, sequence_length)
    with torch.inference_mode():
        for batch in _batches(documents, pieces, max(_BATCH_TOKENS, sequence_length), model.config.vocab_size):
            total += float(model.next_token_nll(batch.to(device)))
            num_targets += batch.num_targets[0]
            report.add(batch.num_tokens, f"loss {total / num_targets:.4f}")
    if not num_targets:
        raise DataError(f"{source.label}: no document has two tokens, so there is nothing to predict; add text")
    loss = total / num_targets
    if not math.isfinite(loss):
        raise DivergedError(f"eval: the loss on {source.label} is {loss}; the weights are damaged or overflow in bf16")
    bpb = None
    if source.num_bytes:
        bpb = loss / math.log(2) * documents.num_tokens / source.num_bytes
    return Evaluation(loss, bpb, num_targets)


def _config(weights: Weights, *, sequence_length: int | None, tokenizer: str | None) -> Config:
    changes: dict[str, object] = {"sources": [], "validation_sources": [], "validation_sets": {}}
    if sequence_length is not None:
        changes["sequence_length"] = sequence_length
    if tokenizer is not None:
        changes["tokenizer"] = tokenizer
    return Config(model=weights.model, data=weights.data.model_copy(update=changes))


def _prepare(
    config: Config, source: SourceConfig, resolved: FileSource | StoreSource, stack: ExitStack
) -> PreparedSource:
    """Tokenise and open the data; what is written for that alone is removed when ``stack`` is closed."""
    if isinstance(resolved, FileSource):
        documents = read_documents(resolved, {})
        first = next(documents, None)
        if first is None:
            raise DataError(f"{source.source}: no documents; name a file with text")
        if first.token_ids is not None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qwen3next-eval-")))
            prefix = folder / "ids"
            with storage_errors(folder, "free space or set TMPDIR"):
                left_out: LeftOuts = {}
                _write_ids(prefix, read_documents(resolved, left_out), config.model.vocab_size)
            log_passed_over(resolved)
            log_left_out(resolved, left_out)
            stored = prepare_evaluation(config, SourceConfig(source=str(prefix))).validation[0]
            return PreparedSource(source.source, 1.0, stored.documents, None, stored.fingerprint, None, None)
        if config.data.tokenizer == NO_TOKENIZER:
            raise ConfigError(f"eval: {source.source} is text and the model came without a tokenizer; name one")
    return prepare_evaluation(config, source).validation[0]


def _write_ids(prefix: Path, documents: Iterable[Document], vocab_size: int) -> None:
    """Documents of token ids as a store: they need no tokenizer, and the model may have none."""
    with StoreWriter(prefix, token_dtype(vocab_size)) as writer:
        for document in documents:
            if document.token_ids is None:
                raise DataError(f"{document.where}: text, after lines of input_ids; put the two into separate files")
            if max(document.token_ids) >= vocab_size:
                raise DataError(
                    f"{document.where}: input_ids: {max(document.token_ids)} is not below the model's vocab_size "
                    f"{vocab_size}"
                )
            writer.append(np.array(document.token_ids, dtype=np.int64))
        writer.finish(source=str(prefix), tokenizer_fingerprint="", num_bytes=None)


def _pieces(documents: DocumentRange, sequence_length: int) -> Iterator[tuple[int, int]]:
    """Positions ``[start, stop)`` of tokens to feed, each followed by a token of the same document to predict."""
    for start, stop in _documents(documents):
        for first in range(start, stop - 1, sequence_length):
            yield first, min(first + sequence_length, stop - 1)


def _documents(documents: DocumentRange) -> Iterator[tuple[int, int]]:
    """Positions of the documents; those without a token are left out."""
    start = 0
    for window in range(0, documents.num_tokens, _WINDOW_TOKENS):
        last = min(window + _WINDOW_TOKENS, documents.num_tokens)
        for stop in documents.document_starts_between(max(window, 1), last).tolist():
            yield start, stop
            start = stop
    yield start, documents.num_tokens


def _batches(
    documents: DocumentRange, pieces: Iterable[tuple[int, int]], max_tokens: int, vocab_size: int
) -> Iterator[PackedBatch]:
    tokens: list[npt.NDArray[np.int64]] = []
    size = 0
    for start, stop in pieces:
        if tokens and size + stop - start > max_tokens:
            yield _batch(tokens)
            tokens, size = [], 0
        tokens.append(read_tokens(documents, start, stop + 1, vocab_size=vocab_size))
        size += stop - start
    if tokens:
        yield _batch(tokens)


def _batch(pieces: Sequence[npt.NDArray[np.int64]]) -> PackedBatch:
    """Pieces, each with the token after it, as one row in which every position has a target."""
    lengths = np.array([len(piece) - 1 for piece in pieces])
    cu_seqlens = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    positions_T = torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))
    return PackedBatch(
        input_ids_T=torch.from_numpy(np.concatenate([piece[:-1] for piece in pieces])),
        labels_T=torch.from_numpy(np.concatenate([piece[1:] for piece in pieces])),
        mtp_targets=(),
        positions_T=positions_T,
        positions_U=positions_T,
        cu_seqlens=cu_seqlens,
        cu_seqlens_cpu=cu_seqlens,
        num_rows=1,
        num_targets=(int(lengths.sum()),),
        sum_squared_lengths=int((lengths**2).sum()),
        sources=(0,),
    )
