"""MANIFEST.json: what a checkpoint consists of, written last, used only after it has been checked.

The last field, ``self_xxh3_128``, is the hash of every byte before its value, so a single flipped bit anywhere in
the file shows; that envelope stays the same in all format versions, which is how an intact manifest of a newer
version can be told from a damaged one. The hashes protect against accident, not against somebody who can write
to the directory and recompute them; the caps and the strict schema below protect against hostile content.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from qwen3next_train.checkpoint.names import FORMAT, MANIFEST_NAME
from qwen3next_train.checkpoint.train_state import Count, TrainState
from qwen3next_train.config.error_lines import json_problem
from qwen3next_train.config.renamed import with_current_names
from qwen3next_train.config.strict_yaml import is_shallow
from qwen3next_train.engine.base import FragmentKind
from qwen3next_train.errors import CheckpointError
from qwen3next_train.parameters import ParamSpec

FORMAT_VERSION = 3
"""The newest that can be read. Written is the lowest that will do, so that older versions can read it."""
MAX_MANIFEST_BYTES = 64 << 20
"""ZeRO-3 on 1,000 ranks cuts each of the 80B model's 800 tensors in 1,000: about 20 MB."""

_MAX_CONTAINERS = 400_000
# Far from where a step's addition would leave the range of a count; FLOPs have a range of their own.
_MAX_COUNT = 2**62
_STRICT = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)
_SELF_KEY = b',\n"self_xxh3_128": "'
_TAIL = b'"\n}\n'
_DIGEST_CHARS = 32

FileName = Annotated[str, Field(pattern=r"\A[A-Za-z0-9_-][A-Za-z0-9_.-]*\z", max_length=128)]
ParameterName = Annotated[str, Field(pattern=r"\A[A-Za-z0-9_.-]+\z", max_length=512)]
Digest = Annotated[str, Field(pattern=r"\A[0-9a-f]{32}\z")]
Size = Annotated[int, Field(ge=0, le=2**50)]


class NewerFormatError(CheckpointError):
    """An intact checkpoint that a newer version of this program has written."""


class WorldLayout(BaseModel):
    """The parallel layout a checkpoint was written by; it may be loaded by any other."""

    model_config = _STRICT

    world_size: Annotated[int, Field(gt=0, le=1_000_000)]
    expert_parallel_size: Annotated[int, Field(gt=0, le=1_000_000)]
    zero_stage: Annotated[int, Field(ge=0, le=3)]


class ParameterEntry(BaseModel):
    """Name and logical shape of one parameter."""

    model_config = _STRICT

    name: ParameterName
    shape: Annotated[list[Annotated[int, Field(gt=0, le=2**40)]], Field(max_length=8)]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class FileEntry(BaseModel):
    """A file of one rank, which before format 3 had one.

    ``fragments`` is flat, three integers a fragment: index of the parameter, offset of the first element, number
    of elements. With millions of fragments a list of records would cost ten times the memory. ``strided_fragments``,
    not in format 1, are those of several runs of elements, five integers each: index of the parameter, offset of the
    first element, number of elements of a run, number of runs, and the distance of their starts.
    """

    model_config = _STRICT

    name: FileName
    size: Size
    xxh3_128: Digest
    rank: Count
    fragments: list[Size]
    strided_fragments: list[Size] = []


@dataclass(frozen=True)
class Header:
    """What a run says of itself in each of its checkpoints.

    Args:
        parameters: the model's parameter table.
        config: the resolved configuration as JSON values.
        layout: the world it runs in.
        versions: library name to version, this package included.
    """

    parameters: Sequence[ParamSpec]
    config: dict[str, Any]
    layout: WorldLayout
    versions: dict[str, str]


class Manifest(BaseModel):
    """A checked manifest."""

    model_config = _STRICT

    format: Literal["qwen3next_train checkpoint"]
    format_version: Literal[1, 2, 3]
    step: Annotated[int, Field(ge=0, lt=10**8)]
    created_at: Annotated[str, Field(pattern=r"\A[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:]{8}\+00:00\z")]
    layout: WorldLayout
    kinds: Annotated[list[FragmentKind], Field(min_length=1, max_length=3)]
    train_state: TrainState
    config: dict[str, Any]
    config_xxh3_128: Digest
    versions: dict[str, str]
    parameters: Annotated[list[ParameterEntry], Field(max_length=100_000)]
    files: Annotated[list[FileEntry], Field(min_length=1, max_length=100_000)]
    self_xxh3_128: Digest

    @property
    def num_bytes(self) -> int:
        """Bytes of all files except the manifest."""
        return sum(file.size for file in self.files)

    @model_validator(mode="after")
    def _check(self) -> Manifest:
        if self.train_state.step != self.step:
            raise ValueError(f"train state of step {self.train_state.step} in a checkpoint of step {self.step}")
        if not all(is_shallow([change.old, change.new]) for change in self.train_state.changes):
            raise ValueError("a change is nested too deeply")
        state = asdict(self.train_state) | {"flops_total": 0}
        counts = (value for value in state.values() if isinstance(value, int))
        if max(counts) >= _MAX_COUNT:
            raise ValueError(f"a count of the train state is {_MAX_COUNT} or more")
        if not is_shallow(self.config):
            raise ValueError("config is nested too deeply")
        if self.config_xxh3_128 != config_hash(self.config):
            raise ValueError("the configuration does not match its hash")
        if len({parameter.name for parameter in self.parameters}) != len(self.parameters):
            raise ValueError("a parameter is listed twice")
        if len({file.name for file in self.files}) != len(self.files):
            raise ValueError("a file is listed twice")
        if self.format_version < 3 and _have_several_files(self.files):
            raise ValueError("a rank has two files")
        sizes = [parameter.numel for parameter in self.parameters]
        if any(size > 2**50 for size in sizes):
            raise ValueError("a parameter of more than 2^50 elements")
        for file in self.files:
            _check_fragments(file, sizes)
        return self


def config_hash(config: dict[str, Any]) -> str:
    """xxh3-128 of a configuration, independent of the order of its keys."""
    return xxhash.xxh3_128_hexdigest(json.dumps(config, sort_keys=True, allow_nan=False).encode())


def encode_manifest(
    *, step: int, header: Header, train_state: TrainState, kinds: Sequence[FragmentKind], files: Sequence[FileEntry]
) -> bytes:
    """The bytes of a manifest, self-hash included; one line per field and per file, for people.

    Raises:
        CheckpointError: a value that :func:`parse_manifest` would reject, so that no such file is ever published.
    """
    fields = {
        "format": FORMAT,
        "format_version": _lowest_version(files),
        "step": step,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "layout": header.layout.model_dump(),
        "kinds": list(kinds),
        "train_state": asdict(train_state),
        "config": header.config,
        "config_xxh3_128": config_hash(header.config),
        "versions": header.versions,
    }
    lines = [f"{json.dumps(key)}: {_compact(value)}" for key, value in fields.items()]
    parameters = [{"name": spec.name, "shape": list(spec.shape)} for spec in header.parameters]
    lines.append(_lines("parameters", parameters))
    lines.append(_lines("files", [file.model_dump(exclude_defaults=True) for file in files]))
    prefix = ("{\n" + ",\n".join(lines)).encode() + _SELF_KEY
    raw = prefix + xxhash.xxh3_128_hexdigest(prefix).encode() + _TAIL
    parse_manifest(raw, step=step)
    return raw


def parse_manifest(raw: bytes, *, step: int) -> Manifest:
    """Check every byte of a manifest and return it, its configuration under the names of this version.

    Args:
        raw: content of the file.
        step: the step its directory's name promises.

    Raises:
        NewerFormatError: intact, but of a newer format.
        CheckpointError: anything wrong; the text is the reason alone, without a path.
    """
    start = len(raw) - len(_TAIL) - _DIGEST_CHARS
    if len(raw) > MAX_MANIFEST_BYTES:
        raise CheckpointError(f"{MANIFEST_NAME} is larger than {MAX_MANIFEST_BYTES} bytes")
    if start < 0 or not raw.endswith(_TAIL) or not raw[:start].endswith(_SELF_KEY):
        raise CheckpointError(f"{MANIFEST_NAME} is incomplete")
    if xxhash.xxh3_128_hexdigest(raw[:start]).encode() != raw[start : -len(_TAIL)]:
        raise CheckpointError(f"{MANIFEST_NAME} does not match its own hash")
    value = _load_json(raw)
    version = value.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        raise NewerFormatError(
            f"written by a newer version (checkpoint format {version}, this version reads up to {FORMAT_VERSION}); "
            "update qwen3next_train"
        )
    try:
        manifest = Manifest.model_validate(value)
    except ValidationError as error:
        raise CheckpointError(f"{MANIFEST_NAME}: {_first_error(error)}") from error
    except RecursionError as error:
        raise CheckpointError(f"{MANIFEST_NAME}: config is nested too deeply") from error
    if manifest.step != step:
        raise CheckpointError(f"{MANIFEST_NAME} is of step {manifest.step}, not of step {step}")
    # The stored hashes are those of what was written, so names are translated after they have been compared.
    return manifest.model_copy(update={"config": with_current_names(manifest.config)})


def _lowest_version(files: Sequence[FileEntry]) -> int:
    if _have_several_files(files):
        return 3
    return 2 if any(file.strided_fragments for file in files) else 1


def _have_several_files(files: Sequence[FileEntry]) -> bool:
    """Whether a rank has more than one."""
    return len({file.rank for file in files}) != len(files)


def _check_fragments(file: FileEntry, sizes: Sequence[int]) -> None:
    triples = file.fragments
    if len(triples) % 3:
        raise ValueError(f"{file.name}: fragments are not triples")
    for index, start, numel in zip(triples[::3], triples[1::3], triples[2::3], strict=True):
        if index >= len(sizes) or numel == 0 or start + numel > sizes[index]:
            raise ValueError(f"{file.name}: fragment ({index}, {start}, {numel}) lies outside its parameter")
    quintuples = file.strided_fragments
    if len(quintuples) % 5:
        raise ValueError(f"{file.name}: strided fragments are not quintuples")
    fields = (quintuples[first::5] for first in range(5))
    for index, start, length, count, stride in zip(*fields, strict=True):
        values = f"({index}, {start}, {length}, {count}, {stride})"
        if count < 2 or length == 0 or stride < length:
            raise ValueError(f"{file.name}: strided fragment {values} is none")
        if index >= len(sizes) or start + (count - 1) * stride + length > sizes[index]:
            raise ValueError(f"{file.name}: strided fragment {values} lies outside its parameter")


def _load_json(raw: bytes) -> dict[str, Any]:
    # Before parsing, because parsed containers cost a hundred times their bytes.
    if raw.count(b"[") + raw.count(b"{") > _MAX_CONTAINERS:
        raise CheckpointError(f"{MANIFEST_NAME} has more than {_MAX_CONTAINERS} lists")
    try:
        value = json.loads(
            raw.decode(), parse_constant=_reject_constant, parse_float=_finite, object_pairs_hook=_unique_keys
        )
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{MANIFEST_NAME} is not valid JSON: {json_problem(error)}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{MANIFEST_NAME} is not a JSON object")
    return value


def _reject_constant(text: str) -> float:
    raise ValueError(f"{text} is not a finite number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is not a finite number")
    return number


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return result


def _first_error(error: ValidationError) -> str:
    detail = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in detail["loc"])
    # Keys come from the file, so they are shown escaped.
    return ascii(f"{where}: {detail['msg']}" if where else detail["msg"])[1:-1][:300]


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _lines(key: str, values: Sequence[Any]) -> str:
    return f'"{key}": [\n' + ",\n".join(_compact(value) for value in values) + "\n]"
