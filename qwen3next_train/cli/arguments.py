"""Parses the command line: options of the program, configuration overrides, positional arguments.

Not argparse: the keys of the schema, with dots, values that begin with a minus and Megatron-LM's switches would
each have to be declared to it, and its error texts name neither the nearest key nor a hint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from qwen3next_train.config import megatron
from qwen3next_train.config.describe import keys
from qwen3next_train.config.error_lines import meant, raise_errors, show, show_name
from qwen3next_train.errors import ConfigError

_TRUTHS = ("true", "false", "1", "0", "yes", "no", "on", "off")
"""Words that no subcommand or path is called, and that people write behind a switch."""


@dataclass(frozen=True)
class Option:
    """One option of the program itself.

    Args:
        name: with dashes.
        metavar: what stands for its value in help; empty for a switch.
        help: one line.
    """

    name: str
    metavar: str
    help: str


@dataclass
class Arguments:
    """A parsed command line.

    Args:
        options: values of the program's options in the order given, by name; a switch has "".
        overrides: configuration overrides as (name without dashes, text); Megatron-LM switches have "true".
        positional: arguments that belong to no option.
    """

    options: dict[str, list[str]] = field(default_factory=dict)
    overrides: list[tuple[str, str]] = field(default_factory=list)
    positional: list[str] = field(default_factory=list)

    def last(self, name: str) -> str | None:
        """The value that counts, or None when the option is absent."""
        return self.options[name][-1] if name in self.options else None


def parse_arguments(argv: Sequence[str], options: Mapping[str, Option]) -> Arguments:
    """Split a command line.

    Raises:
        ConfigError: one line per argument that is not an option, lacks its value or has one too many.
    """
    args = Arguments()
    errors: list[str] = []
    position = 0
    while position < len(argv):
        arg = argv[position]
        position += 1
        if not arg.startswith("-") or arg == "-":
            args.positional.append(arg)
            continue
        name, has_value, value = arg.partition("=")
        name = "--help" if name == "-h" else name
        try:
            if _is_switch(name, options):
                following = argv[position] if position < len(argv) else ""
                _check_switch(name, value if has_value else following, bool(has_value), options)
                value = ""
            elif not has_value:
                if position == len(argv) or argv[position].startswith("--"):
                    raise ConfigError(f"{show_name(name)}: no value; write {show_name(name)} VALUE")
                end = position + _num_values(name, argv[position:], options)
                value = " ".join(argv[position:end])
                position = end
            _take(args, name, value, options)
        except ConfigError as error:
            errors.append(str(error))
    raise_errors(errors)
    return args


def without_option(argv: Sequence[str], name: str) -> list[str]:
    """The command line less an option that takes a value."""
    rest: list[str] = []
    skip = False
    for arg in argv:
        if skip:
            skip = False
        elif arg == name:
            skip = True
        elif not arg.startswith(f"{name}="):
            rest.append(arg)
    return rest


def _take(args: Arguments, name: str, value: str, options: Mapping[str, Option]) -> None:
    if name in options:
        args.options.setdefault(name, []).append(value)
    elif "." in name:
        section = name.partition(".")[0]
        if alike := [option for option in options if option.startswith(f"{section}.")]:
            raise ConfigError(
                f"{show_name(name)}: unknown option; {meant(name, alike, prefix='--')} --help all lists every option"
            )
        args.overrides.append((name.removeprefix("--"), value))
    elif argument := megatron.find(name):
        args.overrides.append((name.removeprefix("--"), "true" if argument.is_switch else value))


def _is_switch(name: str, options: Mapping[str, Option]) -> bool:
    """Whether an option takes no value.

    Raises:
        ConfigError: when it is no option at all.
    """
    if name in options:
        return not options[name].metavar
    if name.startswith("--") and "." in name:
        if name.startswith("--no-") and name.removeprefix("--no-") in keys():
            key = name.removeprefix("--no-")
            raise ConfigError(f"{show_name(name)}: unknown option; write --{key} false")
        return False
    argument = megatron.find(name) if name.startswith("--") else None
    if argument is None:
        if (opposite := megatron.find_opposite(name)) is not None:
            raise ConfigError(
                f"{show_name(name)}: unknown option; it would be the opposite of {opposite.flag} ({opposite.effect}); "
                "leave it out, or give our own key; --help all lists every option"
            )
        known = [*options, *(entry.flag for entry in megatron.arguments()), *(f"--{key}" for key in keys())]
        raise ConfigError(
            f"{show_name(name)}: unknown option; {meant(name, known, prefix='--')} --help all lists every option"
        )
    return argument.is_switch


def _num_values(name: str, words: Sequence[str], options: Mapping[str, Option]) -> int:
    argument = None if name in options or "." in name else megatron.find(name)
    return 1 if argument is None else argument.num_values(words)


def _check_switch(name: str, value: str, attached: bool, options: Mapping[str, Option]) -> None:
    if not attached and value.lower() not in _TRUTHS:
        return
    hint = "leave the value out"
    if name not in options and (argument := megatron.find(name)):
        hint = f"{hint}, or use our own key ({argument.effect})"
    raise ConfigError(f"{show_name(name)}: takes no value (got {show(value)}); {hint}")
