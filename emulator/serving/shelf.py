"""Published adapters in a folder, by name. What is put there later is there, too."""

from pathlib import Path

from offsite.emulator.methods import own_format
from offsite.emulator.plug import ENSEMBLE, experts

CONFIG = "adapter_config.json"


class Shelf:
    """Each folder in it is an adapter, or what a run has published, by its name.

    Of several that answer together NAME is what they say; of several of which one has to be chosen each is NAME:EXPERT.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def names(self) -> list[str]:
        """Return what can be asked for, sorted."""
        return [
            name
            for folder in sorted(self._folder.iterdir())
            if folder.is_dir() and folder.name[0] != "."
            for name in _names(folder)
        ]

    def folders(self, name: str) -> tuple[Path, ...]:
        """Return the folders of the LoRA that answer to a name together; empty where nothing does.

        Raises ValueError for an adapter that cannot be beside others in one batch.
        """
        if name not in self.names():
            return ()
        outer, _, expert = name.partition(":")
        folder = self._folder / outer
        if not (folder / ENSEMBLE).is_file():
            return (_lora(_inner(folder)),)
        _, inner = experts(folder)
        return tuple(_lora(one) for called, one in inner.items() if expert in ("", called))


def _names(folder: Path) -> list[str]:
    if (folder / ENSEMBLE).is_file():
        combine, inner = experts(folder)
        return [folder.name] if combine == "max" else [f"{folder.name}:{expert}" for expert in inner]
    return [folder.name] if _is_adapter(_inner(folder)) else []


def _inner(folder: Path) -> Path:
    """Return the folder of the adapter among what a run has published, or the folder itself."""
    return folder if _is_adapter(folder) else folder / "adapter"


def _is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file() or (folder / own_format.DOCUMENT).is_file()


def _lora(folder: Path) -> Path:
    from offsite.emulator.methods import peft_format  # brings peft, seconds slow

    if (folder / own_format.DOCUMENT).is_file() or not peft_format.is_lora(folder):
        raise ValueError(
            f"{folder}: only LoRA is served beside other adapters, which this is not; write it into a model of its own "
            f"(offsite run export OUT {folder} --as merged --base BASE), and serve that"
        )
    return folder
