"""Where models and tasks come from, and how those are read that do not fit into memory."""

from offsite.emulator.zoo.models import (
    ZOO,
    cache_folder,
    digest,
    load_base,
    load_tokenizer,
    locate,
    refuse_strange_words,
)

__all__ = ["ZOO", "cache_folder", "digest", "load_base", "load_tokenizer", "locate", "refuse_strange_words"]
