"""Writes the lock files of the image: every package with its version and the hash of its wheel.

    .venv/bin/python cluster/lock.py      # run after a change of constraints.txt or pyproject.toml; installs nothing

pip resolves for the machine it runs on, so that must match the image: Linux x86_64 and the image's Python. It downloads
every file, gigabytes of CUDA libraries among them. flash-attn has its own lock, because it exists as source only.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHON = "3.11"  # as in the Dockerfile
EXTRAS = ("deepspeed", "gguf", "lora", "quantise")  # what recipes can ask for
LAUNCHERS = ("boto3", "google-api-python-client")  # the autoscaler's clients for AWS and GCP


def main() -> None:
    here = (platform.system(), platform.machine(), platform.python_version().rpartition(".")[0])
    if here != ("Linux", "x86_64", PYTHON):
        sys.exit(f"this must run on Linux x86_64 with Python {PYTHON}, as the image does")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [requirement for extra in EXTRAS for requirement in project["optional-dependencies"][extra]]
    write("requirements.lock", resolve("--ignore-installed", *project["dependencies"], *extras, *LAUNCHERS))
    flash = project["optional-dependencies"]["flash"]
    write("requirements-flash.lock", resolve("--no-deps", "--no-build-isolation", *flash))


def resolve(*arguments: str) -> list[tuple[str, str, str]]:
    """(name, version, sha256) of everything pip would install. Exits if a file comes from a local disk."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--report", "-"]
    # FLASH_ATTENTION_SKIP_CUDA_BUILD: flash-attn's setup must not look for a CUDA compiler just to report its name.
    environment = {**os.environ, "FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE"}
    command += ["--constraint", str(ROOT / "constraints.txt"), *arguments]
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout)
    found = []
    for one in report["install"]:
        name = re.sub(r"[-_.]+", "-", one["metadata"]["name"]).lower()
        if one["download_info"]["url"].startswith("file:"):
            sys.exit(f"{name} comes from a local file, not from the index; unset PIP_FIND_LINKS and its like")
        found.append((name, one["metadata"]["version"], one["download_info"]["archive_info"]["hashes"]["sha256"]))
    return sorted(found)


def write(name: str, packages: list[tuple[str, str, str]]) -> None:
    head = f"# Made by cluster/lock.py for Python {PYTHON} on Linux x86_64. Used by cluster/Dockerfile.\n"
    lines = [f"{name}=={version} --hash=sha256:{digest}\n" for name, version, digest in packages]
    (ROOT / "cluster" / name).write_text(head + "".join(lines))


if __name__ == "__main__":
    main()
