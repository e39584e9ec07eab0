"""`rcd serve check`: validate a Serve config as strictly as a recipe before `serve deploy` takes it."""

from __future__ import annotations

from pipelines.cli.flags import ServeCheckFlags
from pipelines.serving.config_file import is_ours, read_config


def check(flags: ServeCheckFlags) -> int:
    for application in read_config(flags.config)["applications"]:
        if is_ours(application):
            content = f"serves {', '.join(application['args']['models'])}"
        else:
            content = f"is made by {application['import_path']}"
        print(f"{application.get('name', 'default')} {content}")
    return 0
