"""`rcd serve check`: a Serve config, looked at as strictly as a recipe, before `serve deploy` takes it."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="action", required=True)
    check = commands.add_parser("check", help="name every mistake in a Serve config; nothing is started")
    check.add_argument("config", help="the YAML file for `serve deploy`")


def run(options: argparse.Namespace) -> int:
    from pipelines.serving.config_file import is_ours, read_config  # imports Ray Serve

    for one in read_config(options.config)["applications"]:
        what = f"serves {', '.join(one['args']['models'])}" if is_ours(one) else f"is made by {one['import_path']}"
        print(f"{one.get('name', 'default')} {what}")
    return 0
