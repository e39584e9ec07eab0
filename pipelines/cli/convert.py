"""`rcd convert`: an autoregressive checkpoint as the start of a diffusion model."""

from __future__ import annotations

import os
from pathlib import Path

from pipelines.cli.file_flags import ConvertFlags
from pipelines.cli.terminal import writable_directory
from rcd_core.errors import UserError
from rcd_core.families.convert import converted, convertible
from rcd_core.io.gguf import package_file
from rcd_core.process import ProcessSettings
from rcd_core.text.tokenizer import add_mask_token, load_tokenizer


def convert(flags: ConvertFlags) -> int:
    output = Path(flags.output).expanduser()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} exists and is no empty directory; give a new one")
    if flags.block_length < 1:
        raise UserError(f"--block_length is {flags.block_length}; it must be at least 1")
    writable_directory("--output", flags.output)
    ProcessSettings(verify_weights=not flags.no_verify).apply()
    start = package_file(os.path.expanduser(flags.start))
    kind = convertible(start, flags.shift, flags.attention)
    tokenizer = load_tokenizer(start)
    add_mask_token(tokenizer, flags.mask_token)
    model = converted(start, tokenizer, flags.block_length, shift=flags.shift, attention=flags.attention)
    model.save_pretrained(output, tokenizer=tokenizer)
    mask = model.mask_token_id
    print(
        f"{output}: {kind}, {model.num_parameters():,} parameters, blocks of {flags.block_length}; mask token "
        f"{tokenizer.convert_ids_to_tokens(mask)} ({mask}). Train it before it decodes text"
    )
    return 0
