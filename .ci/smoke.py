"""What the installed wheel must do: `sdk` beside nothing but its own dependencies, `modules` beside all of them."""

import importlib
import importlib.resources
import pkgutil
import subprocess
import sys

PROBE = """
import sys, time
start = time.perf_counter()
import offsite.client
print(time.perf_counter() - start, *({"torch", "ray", "transformers", "deepspeed", "numpy"} & sys.modules.keys()))
"""


def sdk() -> None:
    """Import the SDK: quickly, and without any tensor library; what is no Python came along."""
    probes = [subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True) for _ in "123"]
    best, *heavy = min(probe.stdout.split() for probe in probes)
    assert not heavy, f"import offsite.client loads {heavy}"
    assert float(best) < 0.5, f"import offsite.client takes {best} s"
    assert importlib.resources.files("offsite.protos").joinpath("fleet.proto").is_file()
    assert importlib.resources.files("offsite.client").joinpath("report.html.j2").is_file()
    print(f"import offsite.client takes {float(best):.2f} s and loads no tensor library")


def modules() -> None:
    """Import every module."""
    import offsite

    names = [m.name for m in pkgutil.walk_packages(offsite.__path__, "offsite.") if not m.name.endswith("__main__")]
    for name in names:
        importlib.import_module(name)
    assert len(names) > 80, names
    print(f"{len(names)} modules import")


if __name__ == "__main__":
    {"sdk": sdk, "modules": modules}[sys.argv[1]]()
