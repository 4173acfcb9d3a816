"""An open task as large as one likes, without the hours that its run would take: for what moves files.

Imports where it is called: what only loads this file has no tensor library in its memory.
"""

import json
from pathlib import Path
from typing import Any


def open_task(home: Any, folder: Path, run: str, *, site: str, size: int) -> None:
    """Add a run with one task for a site, and leave the task and its update in the folder, as RUN.json and RUN,
    with the digest as RUN.digest.

    `size` is that of the adapter that the task starts from, in bytes of its tensors.
    """
    import torch

    from offsite.coordinator.bundles.manifests import describe
    from offsite.coordinator.runs.steps.results import BUILD, Built
    from offsite.coordinator.runs.steps.storage import store_schema
    from offsite.coordinator.runs.versions import Version
    from offsite.coordinator.store.blobs import Stored
    from offsite.coordinator.store.journal import Key
    from offsite.kernels.schema import Field, Rule
    from offsite.protos import tensors
    from offsite.protos.documents import to_json, to_plain
    from offsite.protos.spec import BaseRef, Choice, LocalTraining, Manifest, RunSpec, TaskSpec

    journal, blobs = home.journal(), home.blobs()
    generator = torch.Generator().manual_seed(size)
    adapter = {f"{layer}.q.A": torch.randn(size // 160, generator=generator) for layer in range(40)}
    tensors.save(folder / "adapter", adapter)
    digest, nbytes = blobs.take(folder / "adapter")
    base = BaseRef(name="m", digest=digest, layers=1, parameters=1)
    counts = {"parameters": 1, "verbatim": 1, "lossy": 0}
    whole = (Choice(name="whole"),)
    manifest = Manifest(base=base, builders=whole, layers=(0,), trainable=(0,), shared={}, files=(), **counts)
    (folder / "manifest").write_bytes(to_json(manifest))
    listed, listed_size = blobs.take(folder / "manifest")
    schema = {key: Field("F32", tuple(tensor.shape), Rule.MEAN) for key, tensor in adapter.items()}
    method: dict[str, Any] = {"method": Choice(name="lora"), "method_hash": digest}
    built = Built(
        **{"manifest": listed, "manifest_size": listed_size, "bundle": describe(manifest), "base": base, **method},
        version=Version(adapter=digest, broadcast={"": Stored(digest=digest, size=nbytes)}),
        tiers={site: ""},
        schema=store_schema(blobs, folder, schema),
        update_sizes={"": nbytes},
        **{"learning_rate": 1e-3, "computed": "fp32", "recovery": None},
    )
    task = TaskSpec(
        **{"run": run, "round": 0, "rounds": 1, "site": site, "attempt": 0, "base": digest, **method},
        **{
            "manifest": listed,
            "manifest_size": listed_size,
            "adapter": digest,
            "adapter_size": nbytes,
            "update_size": nbytes,
        },
        training=LocalTraining(steps=1, learning_rate=1e-3),
    )
    journal.add_run(run, token=run, owner="olga", spec=to_json(RunSpec(model="m", max_update_norm=1e6)))
    journal.add_step(run, BUILD.name, to_plain(built))
    journal.add_task(Key(run=run, round=0, site=site, attempt=0), spec=to_json(task), signature=b"s")
    journal.close()
    for tensor in adapter.values():
        tensor += 1e-3
    origin = {"broadcast": task.adapter, "method_hash": task.method_hash}
    about, digest = {"offsite": json.dumps(origin)}, folder / f"{run}.digest"
    with tensors.writing(folder / run, schema, metadata=about, digest=digest) as write:
        write(adapter)
    (folder / f"{run}.json").write_bytes(to_json(task))
