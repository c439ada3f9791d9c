"""What wandb is told about a run: the configuration, and where it says nothing the ``WANDB_*`` variables."""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Mapping
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
_TRUE = ("1", "t", "true", "y", "yes", "on")


def check_variables(configured: str, environ: Mapping[str, str]) -> None:
    """Reject variables that are to be followed and cannot be.

    Args:
        configured: ``logging.wandb.mode``.
        environ: the variables.

    Raises:
        ConfigError: names the variable.
    """
    run_id = environ.get("WANDB_RUN_ID", "").strip()
    if resolve_mode(configured, environ) != "disabled" and run_id and not re.fullmatch(WANDB_ID, run_id):
        raise ConfigError(
            f"WANDB_RUN_ID: not an id that wandb takes (got {show(run_id)}); unset it, or give at most 128 characters "
            r"without spaces and / \ # ? % :"
        )


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
