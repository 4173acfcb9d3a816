"""What will become of a site's rows under a model's tokenizer, found before a task comes.

It is found in a process of its own, `python -m offsite.client.site.forecast`, which reads one JSON object from its
standard input and prints one: the agent loads no tensor library.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from offsite.emulator.examples import Source
from offsite.protos.errors import InputError
from offsite.protos.spec import OBJECTIVE


def forecast(source: Source, tokenizer: Path, *, max_length: int, objective: str = OBJECTIVE.name) -> dict[str, Any]:
    """Return how many sequences the rows become, are cut, divided, left out, and what to be warned of.

    Raises InputError if the tokenizer cannot be loaded, or as a task with these settings would end.
    """
    if not tokenizer.is_dir():
        raise InputError(f"{tokenizer}: not a folder; expected one with tokenizer.json, such as a model's own")
    request = {
        "data": str(source.path),
        "tokenizer": str(tokenizer),
        "folders": list(map(str, source.folders)),
        "odd_rows": source.odd_rows,
        "columns": dict(source.columns),
        "max_length": max_length,
        "objective": objective,
    }
    command = [sys.executable, "-P", "-m", "offsite.client.site.forecast"]
    result = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True)
    if result.returncode:
        raise InputError(next(iter(result.stderr.splitlines()[-1:]), f"{tokenizer}: its tokenizer cannot be tried"))
    return dict(json.loads(result.stdout.splitlines()[-1]))


def main() -> int:
    """Answer what is asked on standard input; a fault of the input is one line on standard error."""
    from offsite.emulator import modality, objectives, zoo

    request = json.loads(sys.stdin.read())
    folders, odd_rows = [Path(folder) for folder in request["folders"]], request["odd_rows"]
    source = Source(Path(request["data"]), folders=folders, odd_rows=odd_rows, columns=request["columns"])
    try:
        tokenizer = zoo.load_tokenizer(Path(request["tokenizer"]))
        objective = objectives.make(request["objective"], {})
        examples = objectives.read(objective, source).examples
        encoding = objective.encode(
            modality.default(), examples, tokenizer, max_length=request["max_length"], odd_rows=odd_rows
        )
    except ValueError as error:
        print(error, file=sys.stderr)
        return InputError.exit_code
    print(json.dumps({**encoding.counts, "warnings": encoding.warnings}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
