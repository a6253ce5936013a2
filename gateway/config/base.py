"""What all sections of the configuration have in common.

Owns: how strictly a section is read, and the types of values that several have.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
NAME = r"[^\s\x00-\x1f\x7f]+"  # of an owner, a tag or a key, as limits write it: without white space
Owner = Annotated[str, Field(pattern=f"^{NAME}$", max_length=256)]
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def _is_variable(name: str) -> str:
    if not VARIABLE.fullmatch(name):
        raise ValueError("must be the name of an environment variable, not the secret itself")
    return name


Variable = Annotated[str, AfterValidator(_is_variable)]


class Section(BaseModel):
    """A part of the file: unknown keys are errors, values never change after the start."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False)
