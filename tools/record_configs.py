"""Writes the resolved configs that the tests compare with: run it when a change is meant.

python tools/record_configs.py
"""

import importlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUT = ROOT / "tests" / "golden" / "configs"


def main() -> None:
    """Writes one file per experiment."""
    sys.path.insert(0, str(ROOT))
    OUT.mkdir(parents=True, exist_ok=True)
    for path in sorted((ROOT / "configs").glob("*.py")):
        if path.stem in ("__init__", "backbones", "common", "from_run", "tables"):
            continue
        config = importlib.import_module(f"bhsd_jax.configs.{path.stem}").get_config()
        text = json.dumps(config.to_dict(), indent=1, sort_keys=True)
        (OUT / f"{path.stem}.json").write_text(text + "\n")
        print(path.stem)


if __name__ == "__main__":
    main()
