"""The parser of the command line: what went wrong in three lines, with the word that was probably meant."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from lora_factory.utils.printable import meant


class CommandParser(argparse.ArgumentParser):
    """An ``ArgumentParser`` whose errors are short and name what is near a word that it does not know."""

    def parse_known_args(  # type: ignore[override]  # argparse overloads it by the type of the namespace
        self,
        args: Sequence[str] | None = None,
        namespace: Any = None,  # noqa: ANN401
    ) -> tuple[Any, list[str]]:
        """Parse words, but refuse options that the command does not have before anything that is missing."""
        words = sys.argv[1:] if args is None else list(args)
        for word in words:
            if word == "--" or (self._subparsers is not None and not word.startswith("-")):
                break  # operands, or the words of a sub-command
            flag = word.partition("=")[0]
            if flag.startswith("--") and " " not in flag and flag not in self._option_string_actions:
                self.error(f"there is no option {flag}{meant(flag, self._flags())}")
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """Print what is wrong, how the command is called, and where the options are explained; exit with 2."""
        required = [action for action in self._actions if action.required or not action.option_strings]
        usage = [self.prog, *(_word(action) for action in required), "[OPTIONS]"]
        lines = (f"error: {message}", f"usage: {' '.join(usage)}", f"`{self.prog} --help` shows all options")
        self.exit(2, "\n".join(lines) + "\n")

    def _flags(self) -> list[str]:
        return [flag for flag in self._option_string_actions if flag.startswith("--")]

    def _check_value(self, action: argparse.Action, value: Any) -> None:  # noqa: ANN401
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            self.error(f"there is no command {value!r}{meant(str(value), action.choices)}")
        super()._check_value(action, value)


def _word(action: argparse.Action) -> str:
    name = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    return f"{action.option_strings[-1]} {name}" if action.option_strings else name
