"""Writes pipelines/recipes/README.md: every key of a recipe with its type, default and meaning.

python -m pipelines.recipe.reference          # write the page
python -m pipelines.recipe.reference --check  # exit with 1 when the page is stale
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.recipe.files import RECIPES
from pipelines.recipe.model import Recipe
from pipelines.recipe.settings_files import SETTINGS

Schema = Mapping[str, Any]
PAGE = RECIPES / "README.md"

# Class -> ("" for the section, or a field of it) -> meaning, for the settings classes that come from rcd_core.
CORE = {
    "NoiseSettings": {
        "": "How training examples are masked: each token with p = (1 - eps) t + eps, t uniform in [0, 1).",
        "seed": "Seed of the masks and of the order of examples.",
        "draws": "Different masks per example; epoch e uses draw e mod draws.",
        "eps": "Smallest masking probability.",
        "block_length": "Draw t per block of this many tokens; null draws it per example.",
    },
    "ModelConfig": {
        "": "Sizes of a new model.",
        "family": "Block-causal Qwen3 layers (`sdar`) or bidirectional Llama layers (`llada`).",
        "hidden_size": "Width of the residual stream.",
        "num_layers": "Transformer layers.",
        "num_heads": "Query heads.",
        "num_kv_heads": "Key and value heads.",
        "intermediate_size": "Width of the MLP.",
        "head_dim": "Width of a head; null: `hidden_size / num_heads`.",
        "rope_theta": "Base of the rotary embeddings.",
        "max_positions": "Longest sequence.",
        "tie_embeddings": "Share input and output embeddings.",
    },
    "TrainSettings": {
        "": "One training. Give `steps` or `epochs`.",
        "steps": "Optimizer steps.",
        "epochs": "Passes over the training examples, instead of `steps`.",
        "batch_size": "Rows per step, over all workers.",
        "micro_batch_size": "Rows that a worker holds at once; gradients accumulate. Null: its whole share.",
        "pack_length": "Tokens of a packed row that holds several examples; null: one example per row.",
        "learning_rate": "Peak learning rate of AdamW.",
        "schedule": "Learning-rate schedule after the warmup.",
        "warmup": "Share of the steps with a linearly rising learning rate.",
        "weight_decay": "Weight decay.",
        "betas": "Adam's betas.",
        "clip_norm": "Largest gradient norm.",
        "loss_weight": "Weight of masked tokens: 1/t as in the paper, or 1.",
        "dtype": "Data type of forward and backward passes; master weights are float32.",
        "strategy": "Full copies (`ddp`) or sharded weights (`fsdp2`, `deepspeed`).",
        "deepspeed": "DeepSpeed's own configuration.",
        "cpu_offload": "Keep weights and optimizer state in host memory (`fsdp2`).",
        "activation_checkpointing": "Recompute layers in the backward pass to save memory.",
        "max_skipped_steps": "Steps with a non-finite loss or gradient that are skipped before the training fails.",
        "validate_every": "Steps between validations on held-out examples; null: never.",
        "checkpoint_every": "Steps between checkpoints; an interrupted training resumes from the last one.",
        "log_every": "Steps between log lines.",
        "seed": "Combined with the seed of the recipe.",
    },
    "ResidualSettings": {
        "": "How a target is trained with residuals (Eq. 1 to 3 of arXiv 2601.22954).",
        "source": "Where residuals come from: stored reference predictions (`signals`), the reference inside the "
        "training step (`online`), the model itself on noisier inputs (`self`), or nowhere (`none`); `self_same` and "
        "`on_policy` are controls for experiments.",
        "alpha": "Rule for alpha; `normalized_entropy` is Eq. 3 of the paper.",
        "alpha_scale": "Nats at which alpha is 1 (calibrated_entropy, uniform, learned); null: see `alpha_quantile`.",
        "alpha_quantile": "Quantile of the signals' entropies that becomes `alpha_scale` when that is null.",
        "top_k": "Stored ids to use; null uses all.",
        "dropout": "Share of rows that are trained with alpha = 0; the paper has 0.",
    },
    "DecodeSettings": {
        "": "How a request is decoded. Null means the checkpoint's value, else the family's default.",
        "block_length": "Tokens that are decoded together.",
        "denoising_steps": "Passes per block to plan for; sets the least number of tokens to commit per pass.",
        "max_new_tokens": "Most tokens to generate.",
        "policy": "Which masked tokens a pass commits; `low_confidence_dynamic` commits all above the threshold.",
        "confidence_threshold": "Confidence above which a token is committed.",
        "entropy_bound": "Nats; `entropy_bounded` commits the most certain tokens whose entropies add up to less.",
        "temperature": "Sampling temperature; 0 takes the most probable token.",
        "top_k": "Sample from this many most probable tokens.",
        "top_p": "Sample from the most probable tokens with this total probability.",
        "seed": "Seed of the samples.",
        "filtered_confidence": "Take the confidence after top-k and top-p, as SDAR's code does.",
        "cfg_scale": "Scale of classifier-free guidance (LLaDA).",
        "logits_eos_inf": "Never predict the end of the sequence (LLaDA).",
        "confidence_eos_eot_inf": "Commit end-of-sequence and end-of-turn tokens last (LLaDA).",
        "stop_token_ids": "Token ids that end the answer.",
        "cache": "KV cache: none, exact per block (SDAR), or Fast-dLLM's `prefix` and `dual` (LLaDA).",
        "compat_passes": "Make exactly the forward passes of the authors' code.",
        "residual": "Feed discarded predictions back (RCD, Eq. 2); false is plain block decoding.",
        "residual_source": "Model whose predictions are fed back.",
        "start": "How the first residual of a block is made.",
        "residual_temperature": "T_res, the temperature of alpha; null: the checkpoint's, else 1.",
        "delta_temperature": "Temperature of the fed-back probabilities: 1, or T_res (`residual`).",
        "alpha": "Rule for alpha; null: the one of the training.",
        "alpha_scale": "Nats at which alpha is 1; null: the one of the training.",
        "residual_top_k": "Most probable tokens in the residual; the mean embedding stands for the rest; null: all.",
        "residual_scope": "Positions that get a residual: the block's, or all masked ones.",
        "trace": "Record every pass.",
    },
}

_INTRODUCTION = """\
# Recipes

A recipe describes a run: `--recipe NAME` takes a file of this folder, `--recipe PATH` any YAML file. `--set a.b=VALUE`
changes a key. Unknown keys are refused. [demo.yaml](demo.yaml) contains and comments all keys.

`extends: NAME` takes every key from another recipe, and the file gives only what differs: sections are merged key by
key, other values are replaced, and null removes an inherited entry. The format is YAML 1.2: `1e-3` is a number, `on` is
a string.

This page is generated by `make docs`.
"""


def write_or_check(page: Path, text: str, argv: Sequence[str] | None = None) -> int:
    """The command line of a generated page: write it, or with --check return 1 when it is stale."""
    parser = argparse.ArgumentParser(description=f"Write {page.name}, a page that is generated from the code.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when the page is stale")
    if not parser.parse_args(argv).check:
        page.write_text(text)
        return 0
    if page.exists() and page.read_text() == text:
        return 0
    print(f"{page} is stale; run `make docs`", file=sys.stderr)
    return 1


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    cells = ([" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def field_rows(schema: Schema, definitions: Mapping[str, Schema]) -> Iterator[list[str]]:
    """(key, type, default, meaning) of each property of a JSON schema object."""
    for name, field in schema["properties"].items():
        meaning = field.get("description") or _described(field, definitions)
        yield [f"`{name}`", type_text(field), _default(schema, name, field), meaning]


def type_text(schema: Schema) -> str:
    """A JSON schema in words: "integer ≥ 1 or null"."""
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return " or ".join(dict.fromkeys(type_text(one) for one in schema[union]))
    if "$ref" in schema:
        return _link(schema["$ref"])
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        items = schema.get("prefixItems")
        return f"[{', '.join(map(type_text, items))}]" if items else f"list of {type_text(schema['items'])}"
    if schema.get("type") == "object":
        values = schema.get("additionalProperties") or next(iter(schema.get("patternProperties", {}).values()), None)
        return f"name: {type_text(values)}" if isinstance(values, Mapping) else "mapping"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[key]:g}" for key, sign in signs.items() if key in schema]
    return " ".join([schema.get("type", "any"), ", ".join(limits)]).strip()


def recipe_page() -> str:
    """The text of pipelines/recipes/README.md."""
    schema = Recipe.model_json_schema()
    definitions = {name: _with_meanings(name, one) for name, one in schema["$defs"].items()}
    sections = dict(_sections(schema, definitions, ""))
    parts = [
        _INTRODUCTION,
        "## Shipped recipes\n",
        table(["name", "about"], map(_about, sorted(RECIPES.glob("*.yaml")))),
    ]
    parts += ["Evaluation settings of papers, for `evaluate.settings` and `rcd evaluate --settings`:\n"]
    parts += [table(["name", "about"], map(_about, sorted(SETTINGS.glob("*.yaml"))))]
    head = ["key", "type", "default", "meaning"]
    parts += ["## Keys\n", table(head, field_rows(schema, definitions))]
    for name, paths in sections.items():
        parts += [f"### {name}\n", f"{', '.join(f'`{path}`' for path in paths)}. {definitions[name]['description']}\n"]
        parts += [table(head, field_rows(definitions[name], definitions))]
    return "\n".join(parts)


def _with_meanings(name: str, schema: Schema) -> Schema:
    if name not in CORE:
        return schema
    meanings = CORE[name]
    fields = {key: {**field, "description": meanings[key]} for key, field in schema["properties"].items()}
    return {**schema, "properties": fields, "description": meanings[""]}


def _sections(schema: Schema, definitions: Mapping[str, Schema], prefix: str) -> Iterator[tuple[str, list[str]]]:
    """Name of every definition in use -> the keys that hold it, in the order of the recipe."""
    paths: dict[str, list[str]] = {}
    for key, field in schema["properties"].items():
        for name, suffix in _references(field):
            path = f"{prefix}{key}{suffix}"
            paths.setdefault(name, []).append(path)
            for inner, more in _sections(definitions[name], definitions, f"{path}."):
                paths.setdefault(inner, []).extend(more)
    yield from paths.items()


def _references(schema: Any, suffix: str = "") -> Iterator[tuple[str, str]]:
    """(definition, suffix of the key) for all references in a field's schema."""
    if isinstance(schema, list):
        for one in schema:
            yield from _references(one, suffix)
    elif isinstance(schema, Mapping):
        if "$ref" in schema:
            yield schema["$ref"].rpartition("/")[2], suffix
        for key, value in schema.items():
            if key not in ("default", "$ref"):
                yield from _references(value, f"{suffix}.NAME" if "Properties" in key else suffix)


def _described(field: Schema, definitions: Mapping[str, Schema]) -> str:
    return next((str(definitions[name]["description"]) for name, _ in _references(field)), "")


def _default(schema: Schema, name: str, field: Schema) -> str:
    if name in schema.get("required", ()):
        return "required"
    default = field.get("default", {})  # JSON schemas do not show default factories
    return "" if isinstance(default, dict) and default else f"`{json.dumps(default)}`"


def _link(reference: str) -> str:
    name = reference.rpartition("/")[2]
    return f"[{name}](#{name.lower()})"


def _about(path: Path) -> list[str]:
    """Link to a shipped file, and the comment in its first line."""
    with path.open() as lines:
        return [f"[{path.stem}]({os.path.relpath(path, RECIPES)})", next(lines).removeprefix("#").strip()]


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, recipe_page()))
