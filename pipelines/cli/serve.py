"""`rcd serve check`: validate a Serve config as strictly as a recipe before `serve deploy` takes it."""

from __future__ import annotations

from pipelines.cli.flags import ServeCheckFlags
from pipelines.serving.api_keys import api_keys, check_host
from pipelines.serving.config_file import http_host, is_ours, read_config


def check(flags: ServeCheckFlags) -> int:
    config = read_config(flags.config)
    for application in config["applications"]:
        if is_ours(application):
            allowed = bool(application["args"].get("allow_without_keys"))
            check_host("http_options.host", http_host(config), api_keys(), allowed, "here")
            content = f"serves {', '.join(application['args']['models'])}"
        else:
            content = f"is made by {application['import_path']}"
        print(f"{application.get('name', 'default')} {content}")
    return 0
