"""Where models and tasks come from, and how those are read that do not fit into memory."""

from offsite.emulator.zoo.models import (
    ZOO,
    cache_folder,
    digest,
    is_hub_id,
    load_base,
    load_tokenizer,
    locate,
    look_up,
    refuse_strange_words,
    survey,
)

__all__ = [
    "ZOO",
    "cache_folder",
    "digest",
    "is_hub_id",
    "load_base",
    "load_tokenizer",
    "locate",
    "look_up",
    "refuse_strange_words",
    "survey",
]
