"""What a command says: sentences to people, or one JSON document to programs."""

import json
from typing import Any, Literal


def say(format: Literal["text", "json"], document: Any, *lines: str) -> None:
    """Print the document, or the lines."""
    if format == "json":
        print(as_json(document, indent=2), flush=True)
    else:
        for line in lines:
            print(line, flush=True)


def as_json(value: Any, **layout: Any) -> str:
    """Write what another party says as JSON, null for times that are no numbers, as one that lies may send."""
    from offsite.protos.figures import without_infinities

    return json.dumps(without_infinities(value)[0], allow_nan=False, **layout)
