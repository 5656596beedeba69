"""Everything in `data` but the loader, and what it stands on, imports without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BLOCK = "import sys; sys.modules['torch'] = None; "


def imports(names):
    code = BLOCK + "; ".join(f"import {name}" for name in names)
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_data_is_torch_free():
    files = [p.relative_to(ROOT).with_suffix("") for p in (ROOT / "megallm/data").rglob("*.py")]
    names = sorted(".".join(p.parts) for p in files if p.stem not in ("loader", "__init__"))
    assert "megallm.data.megatron.order" in names and len(names) >= 9
    done = imports([*names, "megallm.base.rng", "megallm.base.files", "megallm.base.extension"])
    assert done.returncode == 0, done.stderr


def test_the_loader_is_not():
    assert imports(["megallm.data.loader"]).returncode != 0
