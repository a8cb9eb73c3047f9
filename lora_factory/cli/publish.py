"""Flags and output of the commands that push to the Hub: ``lora-factory push`` and ``lora-factory zoo push``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lora_factory.cli.options import add_required
from lora_factory.cli.output import say

if TYPE_CHECKING:
    from lora_factory.hub.client import Writer


def add_push_flags(parser: argparse.ArgumentParser) -> None:
    """Add what every push takes: where to, and how the commit is made."""
    add_required(parser, "--repo-id", "Hub id to push to, user/name")
    parser.add_argument(
        "--tag", action="append", default=[], help="a further tag for the card; give it again for several"
    )
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--revision", help="branch to push to, made if it is missing (default: main)")
    parser.add_argument("--commit-message", help="first line of the commit (default: what is pushed)")
    parser.add_argument("--create-pr", action="store_true", help="propose the commit as a pull request")
    parser.add_argument("--dry-run", action="store_true", help="show the files and the card, and push nothing")


def publish(write: Writer, options: argparse.Namespace, default_message: str, repo_type: str = "model") -> None:
    """Push what ``write`` writes, or show it, and print the outcome.

    Args:
        write: Fills a folder with the files.
        options: The parsed flags of ``add_push_flags``.
        default_message: First line of the commit if the user gives none.
        repo_type: "model" or "dataset".
    """
    from lora_factory.hub.client import preview, push

    if options.dry_run:
        files, card = preview(write, options.repo_id)
        lines = [f"{size:>14,}  {name}" for name, size in files.items()]
        say("would push to " + options.repo_id, *lines, "", card.rstrip("\n"))
        return
    commit = push(
        write,
        options.repo_id,
        default_message=default_message,
        repo_type=repo_type,
        private=options.private,
        revision=options.revision,
        commit_message=options.commit_message,
        create_pr=options.create_pr,
    )
    say(f"pushed {commit.pr_url or commit.commit_url}")
