"""The owner's doctor: a port that is taken, a kit of another role, a policy with a mistake."""

import json
import socket
from pathlib import Path
from typing import Any

from offsite.protos.security.pki import Authority


def test_what_a_coordinator_needs_is_looked_at(offsite: Any, tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "pki")
    owner, ward = authority.issue("coordinator", "hub"), authority.issue("site", "ward")
    (tmp_path / "good.toml").write_text(f'models = {{ base = "{tmp_path}" }}\n')
    (tmp_path / "odd.toml").write_text("modells = {}\n")

    def looked(kit: Path, policy: str, port: int, disk: str = "0.001") -> tuple[int, dict[str, Any]]:
        told = offsite(
            *("coordinator", "doctor", "--identity", str(kit), "--policy", str(tmp_path / policy)),
            *("--home", str(tmp_path / "home"), "--listen", f"127.0.0.1:{port}", "--disk", disk, "--memory", "0.001"),
            *("--format", "json"),
        )
        return told.returncode, {row["name"]: row for row in json.loads(told.stdout)}

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, seen = looked(ward, "odd.toml", port, "1e9")
    assert code == 8 and [name for name, row in seen.items() if row["verdict"] == "fail"] == [
        *("kit", "port", "policy", "disk"),
    ]
    assert "Address already in use; end what listens there" in seen["port"]["message"]
    assert "here one of coordinator is needed" in seen["kit"]["message"]
    assert "modells: there is no such field; did you mean models?" in seen["policy"]["message"]
    code, seen = looked(owner, "good.toml", port)
    assert code == 0 and {row["verdict"] for row in seen.values()} == {"ok"}, seen
    assert seen["port"]["message"] == f"127.0.0.1:{port} is free" and not (tmp_path / "home").exists()
