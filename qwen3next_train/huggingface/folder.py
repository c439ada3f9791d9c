"""Reads the files of a Hugging Face checkpoint folder, trusting none of them.

Nothing is unpickled, no name leads out of the folder, every shard's header is checked against the index before a
single weight is read, and weights are memory-mapped. A folder of the Hugging Face cache, whose files are links into
the cache's own ``blobs``, is read too; any other link out of the folder is rejected.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from qwen3next_train.checkpoint.filesystem import LOCAL_FILESYSTEM
from qwen3next_train.checkpoint.tensor_file import open_tensor_file
from qwen3next_train.config.error_lines import json_problem, show, show_name
from qwen3next_train.data.reading import read_error
from qwen3next_train.errors import CheckpointError, DataError
from qwen3next_train.files import NO_SUCH_FILE

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_JSON_BYTES = 64 << 20
"""Longest JSON file that is read; the index of the 80B model has 9 MB."""

_MAX_OPEN_SHARDS = 16
_SHARD_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,200}\.safetensors")


@dataclass(frozen=True)
class StoredTensor:
    """What a shard's header says of one tensor.

    Args:
        shard: the file that holds it.
        shape: its shape.
        dtype: its dtype as safetensors calls it (``BF16``).
    """

    shard: str
    shape: tuple[int, ...]
    dtype: str


class HfFolder:
    """A folder with ``config.json`` and safetensors shards.

    Args:
        path: the folder.

    Raises:
        DataError: a file is missing, damaged, out of the folder, or shards and index contradict each other.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise DataError(f"{path}: not a directory; name a folder with config.json and safetensors files")
        self.path = path
        self.config = self._read_json(CONFIG_NAME)
        self._open: OrderedDict[str, safe_open] = OrderedDict()
        weight_map = self._weight_map()
        self.shards = tuple(sorted(set(weight_map.values()))) if weight_map else (SINGLE_NAME,)
        """File names of the shards."""
        self.tensors: dict[str, StoredTensor] = {}
        """Every tensor of the folder by name."""
        for shard in self.shards:
            self._add(shard, None if weight_map is None else weight_map)
        for name, shard in (weight_map or {}).items():
            if name not in self.tensors:
                raise DataError(f"{path / shard}: {show_name(name)} is missing, though {INDEX_NAME} names it")

    def names_in(self, shard: str) -> list[str]:
        """Names of a shard's tensors."""
        return [name for name, tensor in self.tensors.items() if tensor.shard == shard]

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor in its own shape and dtype, mapped from its file until the tensor is gone."""
        shard = self.tensors[name].shard
        if shard not in self._open:
            if len(self._open) == _MAX_OPEN_SHARDS:
                self._open.popitem(last=False)
            self._open[shard] = self._open_shard(shard)
        self._open.move_to_end(shard)
        tensor: torch.Tensor = self._open[shard].get_tensor(name)
        return tensor

    def close(self, shard: str) -> None:
        """Unmap a shard, as soon as none of its tensors is in use."""
        self._open.pop(shard, None)

    def has(self, name: str) -> bool:
        """Whether the folder has a file of that name."""
        return (self.path / name).is_file()

    def read_bytes(self, name: str) -> bytes:
        """Content of a small file.

        Raises:
            DataError: it is missing, out of the folder or too long.
            StorageError: it cannot be read now.
        """
        real = self._real_path(name)
        try:
            if real.stat().st_size > MAX_JSON_BYTES:
                raise DataError(f"{self.path / name}: longer than {MAX_JSON_BYTES} bytes")
            return real.read_bytes()
        except OSError as error:
            raise read_error(self.path / name, error) from error

    def _read_json(self, name: str) -> dict[str, Any]:
        raw = self.read_bytes(name)
        try:
            value = json.loads(raw, object_pairs_hook=_unique_keys)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{self.path / name}: not JSON ({json_problem(error)}); repair it or fetch it again"
            ) from error
        if not isinstance(value, dict):
            raise DataError(
                f"{self.path / name}: not a JSON object but {type(value).__name__}; repair it or fetch it again"
            )
        return value

    def _weight_map(self) -> dict[str, str] | None:
        """Shard by tensor name; None when everything is in one file without an index."""
        has_index, has_single = (self.path / INDEX_NAME).exists(), (self.path / SINGLE_NAME).exists()
        if has_index and has_single:
            raise DataError(f"{self.path}: has both {SINGLE_NAME} and {INDEX_NAME}; remove the one that is out of date")
        if not has_index and not has_single:
            shard = min((path.name for path in self.path.glob("*.safetensors")), default=None)
            if shard is not None:
                raise DataError(
                    f"{self.path}: has {show_name(shard)} but neither {SINGLE_NAME} nor {INDEX_NAME}, which says what "
                    "is in which file; fetch it again"
                )
            raise DataError(
                f"{self.path}: has neither {SINGLE_NAME} nor {INDEX_NAME}; pickled weights are not read, "
                "save the model as safetensors"
            )
        if has_single:
            return None
        where = self.path / INDEX_NAME
        weight_map = self._read_json(INDEX_NAME).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise DataError(f"{where}: weight_map: expected a mapping of tensor to file, found {show(weight_map)}")
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
                raise DataError(
                    f"{where}: {show_name(name)}: expected the name of a .safetensors file in the same folder, "
                    f"found {show(shard)}"
                )
        return weight_map

    def _add(self, shard: str, weight_map: Mapping[str, str] | None) -> None:
        """Take a shard's header into :attr:`tensors`."""
        handle = self._open_shard(shard)
        for name in handle.keys():  # noqa: SIM118 - not a dict
            if weight_map is not None and weight_map.get(name) != shard:
                other = weight_map.get(name)
                owner = "does not name it" if other is None else f"places it in {other}"
                raise DataError(f"{self.path / shard}: holds {show_name(name)}, but {INDEX_NAME} {owner}")
            view = handle.get_slice(name)
            self.tensors[name] = StoredTensor(shard, tuple(view.get_shape()), view.get_dtype())

    def _open_shard(self, shard: str) -> safe_open:
        try:
            return open_tensor_file(LOCAL_FILESYSTEM, self._real_path(shard))
        except CheckpointError as error:
            raise DataError(" ".join(str(error).split())) from error
        except OSError as error:
            raise read_error(self.path / shard, error) from error
        except SafetensorError as error:
            raise DataError(f"{self.path / shard}: cannot be read ({' '.join(str(error).split())})") from error

    def _real_path(self, name: str) -> Path:
        root = self.path.resolve()
        allowed = [root]
        if root.parent.name == "snapshots":
            # models--OWNER--NAME/snapshots/REVISION/FILE is a link to models--OWNER--NAME/blobs/HASH.
            allowed.append(root.parent.parent / "blobs")
        try:
            real = (root / name).resolve(strict=True)
        except (OSError, RuntimeError) as error:
            # A link to itself is a RuntimeError before Python 3.13.
            if isinstance(error, OSError) and error.errno not in NO_SUCH_FILE:
                raise read_error(self.path / name, error) from error
            raise DataError(f"{self.path / name}: missing, or a link that leads nowhere; repair it") from error
        if real.parent not in allowed:
            raise DataError(f"{self.path / name}: a link out of the folder; copy the file there")
        if not real.is_file():
            raise DataError(f"{self.path / name}: not a regular file; put the file there")
        return real


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return result
