"""A screen belongs to whoever was called by a person, not to the libraries below."""

import contextlib
import warnings
from collections.abc import Iterator
from logging import getLogger

from transformers.utils import logging


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep progress bars and advice of libraries off the screen."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    # Saving a model imports DeepSpeed where it is installed, and it talks meanwhile; reading one in layers, accelerate.
    talkers = [getLogger("DeepSpeed"), getLogger("accelerate.big_modeling")]
    before = [talker.disabled for talker in talkers]
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for talker in talkers:
        talker.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of what one library tells the other
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
        for talker, disabled in zip(talkers, before, strict=True):
            talker.disabled = disabled
