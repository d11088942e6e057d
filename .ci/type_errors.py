"""
Checks pyright's errors against the budget in pyproject.toml:

    python .ci/type_errors.py

An import of this package that pyright cannot resolve is always an error.
"""

import json
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> int:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    budget = settings["tool"]["empathic"]["pyright_errors"]
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    try:
        found = json.loads(done.stdout)["generalDiagnostics"]
    except ValueError:
        print(f"pyright did not run: {done.stderr or done.stdout}", file=sys.stderr)
        return 1
    errors = [entry for entry in found if entry["severity"] == "error"]
    unresolved = [
        entry
        for entry in errors
        if entry.get("rule") == "reportMissingImports" and ('"empathic' in entry["message"] or '".' in entry["message"])
    ]
    for entry in unresolved:
        line = entry["range"]["start"]["line"] + 1
        print(f"{Path(entry['file']).relative_to(ROOT)}:{line}: {entry['message']}", file=sys.stderr)
    if len(errors) > budget:
        places = Counter(Path(entry["file"]).relative_to(ROOT).parts[0] for entry in errors)
        print(
            f"pyright finds {len(errors)} errors, and the budget in pyproject.toml is {budget}: remove as many as the "
            f"change added. They are in {', '.join(f'{place} ({count})' for place, count in places.most_common())}.",
            file=sys.stderr,
        )
    print(f"pyright: {len(errors)} errors (budget {budget}), {len(unresolved)} unresolved imports of this package")
    return int(len(errors) > budget or bool(unresolved))


if __name__ == "__main__":
    sys.exit(main())
