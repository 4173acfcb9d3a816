"""A screen belongs to whoever was called by a person, not to the libraries below."""

import contextlib
from collections.abc import Iterator
from logging import getLogger

from transformers.utils import logging


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep progress bars and advice of libraries off the screen."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    deepspeed = getLogger("DeepSpeed")  # saving a model imports it where it is installed, and it talks meanwhile
    before = deepspeed.disabled
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    deepspeed.disabled = True
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
        deepspeed.disabled = before
