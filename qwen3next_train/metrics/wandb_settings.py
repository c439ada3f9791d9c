"""What wandb is told about a run: the configuration, and where it says nothing the ``WANDB_*`` variables."""

from __future__ import annotations

import os
import re
import secrets
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from qwen3next_train.config.error_lines import show
from qwen3next_train.config.schema import WandbConfig
from qwen3next_train.errors import ConfigError
from qwen3next_train.metrics.names import WANDB_ID

Mode = Literal["online", "offline", "disabled"]

_ENV_MODES: dict[str, Mode] = {
    "online": "online",
    "run": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}
_PROJECT = r"[^/\\#?%:]{1,128}"
_MAX_TAG_LENGTH = 64
_MAX_INIT_S = 86_400
_NUMBER = re.compile(r"[0-9]+(\.[0-9]*)?")

DECIDED = (
    *("WANDB_CONSOLE", "WANDB_DISABLE_CODE", "WANDB_DISABLE_GIT", "WANDB_FINISH_TIMEOUT", "WANDB_INIT_TIMEOUT"),
    *("WANDB_MODE", "WANDB_PROJECT", "WANDB_RESUME", "WANDB_RUN_ID", "WANDB_SAVE_CODE", "WANDB_SILENT", "WANDB_TAGS"),
)
"""Variables that wandb is not to see: it is told all of this, and would not even start where one makes no sense."""

_TRUE = ("1", "t", "true", "y", "yes", "on")


def check_settings(config: WandbConfig, environ: Mapping[str, str], *, writes: bool) -> None:
    """Reject what wandb is to be told and does not take, which would turn it off.

    Args:
        config: section ``logging.wandb``.
        environ: the variables that hold where the section says nothing.
        writes: whether this process is the one that starts wandb, so that its folder has to be here.

    Raises:
        ConfigError: names the setting or variable.
    """
    if resolve_mode(config.mode, environ) == "disabled":
        return
    run_id = environ.get("WANDB_RUN_ID", "").strip()
    if run_id and not re.fullmatch(WANDB_ID, run_id):
        raise ConfigError(
            f"WANDB_RUN_ID: not an id that wandb takes (got {show(run_id)}); unset it, or give at most 128 characters "
            r"without spaces and / \ # ? % :"
        )
    page = page_settings(config, "", environ)
    if not re.fullmatch(_PROJECT, page["project"]):
        origin = "logging.wandb.project" if page["project"] == config.project else "WANDB_PROJECT"
        raise ConfigError(
            f"{origin}: not a project that wandb takes (got {show(page['project'])}); give at most 128 characters "
            r"without / \ # ? % :"
        )
    if not all(0 < len(tag) <= _MAX_TAG_LENGTH for tag in page["tags"]):
        tag = next(tag for tag in page["tags"] if not 0 < len(tag) <= _MAX_TAG_LENGTH)
        origin = "logging.wandb.tags" if config.tags else "WANDB_TAGS"
        raise ConfigError(
            f"{origin}: a tag that is empty or longer than {_MAX_TAG_LENGTH} (got {show(tag)}); change it"
        )
    init_timeout_s(environ)
    if writes and (folder := environ.get("WANDB_DIR")) and not _can_be_written(Path(folder)):
        # wandb itself would write to a temporary folder, without a word.
        raise ConfigError(f"WANDB_DIR: not a folder that can be written (got {show(folder)}); make it or unset it")


def _can_be_written(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def init_timeout_s(environ: Mapping[str, str]) -> float | None:
    """Seconds that ``wandb.init`` may take, from ``WANDB_INIT_TIMEOUT``; None where it says nothing.

    Raises:
        ConfigError: it is no positive number.
    """
    text = environ.get("WANDB_INIT_TIMEOUT", "").strip()
    if not text:
        return None
    if not _NUMBER.fullmatch(text) or not 0 < float(text) <= _MAX_INIT_S:
        raise ConfigError(
            f"WANDB_INIT_TIMEOUT: not a number of seconds up to {_MAX_INIT_S} (got {show(text)}); change or unset it"
        )
    return float(text)


def new_run_id(environ: Mapping[str, str]) -> str:
    """The id of a new run: ``WANDB_RUN_ID`` where wandb accepts it, else eight random lower-case letters and digits."""
    given = environ.get("WANDB_RUN_ID", "").strip()
    if re.fullmatch(WANDB_ID, given):
        return given
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))


def resolve_mode(configured: str, environ: Mapping[str, str]) -> Mode:
    """What to try first: ``auto`` follows ``WANDB_DISABLED``, then ``WANDB_MODE``, else online (no key: offline).

    Raises:
        ConfigError: ``WANDB_MODE`` is followed and says none of the modes.
    """
    if configured != "auto":
        return _ENV_MODES[configured]
    if environ.get("WANDB_DISABLED", "").strip().lower() in _TRUE:
        return "disabled"
    text = environ.get("WANDB_MODE", "").strip()
    mode = _ENV_MODES.get(text.lower() or "online")
    if mode is None:
        raise ConfigError(
            f"WANDB_MODE: not a mode (got {show(text)}); give online, offline or disabled, or set logging.wandb.mode"
        )
    return mode


def page_settings(config: WandbConfig, run_name: str, environ: Mapping[str, str]) -> dict[str, Any]:
    """Project, entity, name and tags, as ``wandb.init`` takes them.

    Args:
        config: section ``logging.wandb``. A project that was not given, and other settings that are empty, leave
            the word to ``WANDB_PROJECT``, ``WANDB_ENTITY``, ``WANDB_NAME`` and ``WANDB_TAGS``.
        run_name: name where neither says one.
        environ: the variables.
    """
    given = config.project if "project" in config.model_fields_set else ""
    tags = [tag.strip() for tag in environ.get("WANDB_TAGS", "").split(",")]
    return {
        "project": given or environ.get("WANDB_PROJECT", "").strip() or config.project,
        "entity": config.entity or environ.get("WANDB_ENTITY", "").strip() or None,
        "name": config.name or environ.get("WANDB_NAME", "").strip() or run_name,
        "tags": config.tags or [tag for tag in tags if tag],
    }
