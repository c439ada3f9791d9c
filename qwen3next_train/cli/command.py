"""What a subcommand is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qwen3next_train.cli.arguments import Arguments, Option
from qwen3next_train.config.error_lines import raise_errors
from qwen3next_train.config.settings import from_command_line
from qwen3next_train.errors import ConfigError

CONFIG_OPTIONS = (
    Option("--config", "FILE", "YAML file, or the name of a shipped one; repeatable, later files win"),
    Option("--print-config", "", "print the resolved configuration as YAML and exit"),
)
COMMON_OPTIONS = (
    *CONFIG_OPTIONS,
    Option("--help", "", "print this text and exit; qwen3next-train --help SECTION prints the keys of a section"),
    Option("--version", "", "print the version and exit"),
)


@dataclass(frozen=True)
class Command:
    """One subcommand.

    Args:
        name: as on the command line.
        summary: one line of the program's help, no longer than fits beside the name.
        run: does it; returns the exit code.
        usage: what stands after the name in the usage line.
        options: its own options.
        max_positional: how many positional arguments it takes.
        keys: the configuration keys it reads; None for all of them, and for configuration files. What works on
            finished weights takes the rest from the weights.
        details: further sentences for its own help.
    """

    name: str
    summary: str
    run: Callable[[Arguments], int]
    usage: str
    options: tuple[Option, ...] = ()
    max_positional: int = 0
    keys: tuple[str, ...] | None = None
    details: str = ""

    @property
    def all_options(self) -> tuple[Option, ...]:
        """The options it shares with other subcommands, then its own."""
        shared = (option for option in COMMON_OPTIONS if self.keys is None or option not in CONFIG_OPTIONS)
        return (*shared, *self.options)

    def check_keys(self, args: Arguments) -> None:
        """Reject a configuration key that would have no effect.

        Raises:
            ConfigError: names the key and those that have one.
        """
        if self.keys is None:
            return
        given = from_command_line(args.overrides, 1)
        raise_errors(given.errors)
        for setting in given.settings:
            if setting.key not in self.keys:
                reads = f"of the configuration it reads {', '.join(self.keys)}" if self.keys else "it reads none"
                own = "--" + setting.key.rpartition(".")[2].replace("_", "-")
                instead = f"give {own}" if own in {option.name for option in self.options} else "leave it out"
                raise ConfigError(f"{setting.origin.label(setting.key)}: not read by {self.name}; {instead}, {reads}")
