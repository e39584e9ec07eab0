"""A second try in a Ray Data actor. Ray itself calls again only what a lost actor left."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from pipelines.run.messages import is_full_disk
from rcd_core.errors import UserError

P = ParamSpec("P")
T = TypeVar("T")
logger = logging.getLogger(__name__)


def once_more(function: Callable[P, T]) -> Callable[P, T]:
    """The function, called again after the first error. A UserError and a full disk would come again, so they end it.

    What the function writes must bear a second call.
    """

    @functools.wraps(function)
    def repeated(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if isinstance(error, UserError) or is_full_disk(error):
                raise
            logger.exception("an error; trying once more")
        return function(*args, **kwargs)

    return repeated
