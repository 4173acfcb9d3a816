"""Plug-ins by classes of their own, as `offsite.client.plugins` has them: settings with types and completion."""

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, dataclass_transform

from offsite.protos.spec import Choice


@dataclass_transform(kw_only_default=True, frozen_default=True)
class Config:
    """A plug-in's settings; in a `RunSpec` it stands for its `choice`, and `first + second` is a chain."""

    plugin: ClassVar[str]

    def __init_subclass__(cls, *, name: str) -> None:
        """Make a frozen dataclass of the plug-in of a name."""
        cls.plugin = name
        dataclass(frozen=True, kw_only=True)(cls)

    @property
    def choice(self) -> Choice:
        """The plug-in by name, with those settings that are not its defaults."""
        settings: dict[str, Any] = {}
        for field in fields(self):  # type: ignore[arg-type]  # each of its classes is a dataclass
            value = getattr(self, field.name)
            default = field.default_factory() if field.default_factory is not MISSING else field.default
            if value != default:
                settings[field.name] = value
        return Choice(name=self.plugin, settings=settings)

    def __add__(self, after: "Config | Sequence[Config]") -> "tuple[Config, ...]":
        return (self, *(after if isinstance(after, Sequence) else (after,)))

    def __radd__(self, before: "Sequence[Config]") -> "tuple[Config, ...]":
        return (*before, self)
