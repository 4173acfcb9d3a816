"""Adapters that no other library has, as files: their tensors, and which method they are of."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from offsite.emulator import catalogue
from offsite.emulator.methods.base import Adapter, Method

DOCUMENT, TENSORS = "offsite_adapter.json", "offsite_adapter.safetensors"
CARD = """# An adapter of {base}

Method `{method}` of Offsite, which stays beside the weights of its base:

```python
from pathlib import Path

from offsite.emulator.plug import load

model = load(base, Path("adapter"))  # base: the transformers model {base}
```
"""


def write(directory: Path, method: Method, adapter: Adapter, *, base_name: str) -> None:
    """Write a recovered adapter, its method with all settings, and in a README how it is loaded."""
    directory.mkdir(parents=True, exist_ok=True)
    settings: Any = method  # a dataclass, as all plug-ins are
    document = {"method": method.name, "settings": asdict(settings), "base": base_name}
    (directory / DOCUMENT).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")
    (directory / "README.md").write_text(CARD.format(base=base_name, method=method.name))
    tensors = {key: tensor.contiguous() for key, tensor in sorted(adapter.items())}
    save_file(tensors, directory / TENSORS, metadata={"format": "pt"})


def base(directory: Path) -> str:
    """Return the name of the base that an adapter which `write` wrote is of."""
    return str(json.loads((directory / DOCUMENT).read_text()).get("base", ""))


def read(directory: Path) -> tuple[Method, Adapter]:
    """Read what `write` wrote; raises ValueError if it is not that."""
    file = directory / DOCUMENT
    try:
        document = json.loads(file.read_text())
        method, settings = document["method"], document["settings"]
        adapter = load_file(directory / TENSORS)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(
            f"{directory}: expected a published adapter, {DOCUMENT} with a method and its settings and {TENSORS}, "
            f"but {type(error).__name__}: {error}"
        ) from None
    made: Method = catalogue.METHODS.make(method, settings)
    made.schema(adapter)  # refuses keys that are none of the method's
    return made, adapter
