"""Types of recipe keys, and the base class of sections."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag

from pipelines.recipe.files import ENTRY_NAME
from rcd_core.families.config import ModelConfig
from rcd_core.tasks.dialects import DIALECTS
from rcd_core.tasks.rows import OWN_COLUMNS


def _known_dialect(name: str) -> str:
    if name not in (OWN_COLUMNS, *DIALECTS):
        raise ValueError(f"allowed: {', '.join((OWN_COLUMNS, *DIALECTS))}")
    return name


# Each union has tags in angle brackets, which keep pydantic to one complaint per value; see files.explain.
ModelSource = Annotated[  # a checkpoint, or the sizes of a new model
    Annotated[str, Tag("<checkpoint>")] | Annotated[ModelConfig, Tag("<config>")],
    Discriminator(lambda value: "<checkpoint>" if isinstance(value, str) else "<config>"),
]
DataSource = Annotated[
    Annotated[str, Tag("<one>")] | Annotated[tuple[str, ...], Tag("<many>"), Field(min_length=1)],
    Discriminator(lambda value: "<many>" if isinstance(value, list | tuple) else "<one>"),
]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Workers = Annotated[  # a number, or [min, max]
    Annotated[Count, Tag("<fixed>")] | Annotated[tuple[Count, Count], Tag("<elastic>")],
    Discriminator(lambda value: "<elastic>" if isinstance(value, list | tuple) else "<fixed>"),
]
Positive = Annotated[float, Field(gt=0)]
DialectName = Annotated[str, AfterValidator(_known_dialect)]
EntryName = Annotated[str, Field(pattern=ENTRY_NAME)]
Baseline = Annotated[  # whether to train one, or a checkpoint
    Annotated[str, Tag("<checkpoint>")] | Annotated[bool, Tag("<switch>")],
    Discriminator(lambda value: "<checkpoint>" if isinstance(value, str) else "<switch>"),
]


class Section(BaseModel):
    """A section of the recipe. The docstring below a key is its description in recipes/README.md."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
