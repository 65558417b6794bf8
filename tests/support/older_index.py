"""Indexes as earlier releases wrote them."""

import json


def without_sums(folder):
    """Make an index one of the first format, which had no checksums."""
    values = json.loads((folder / "manifest.json").read_text())
    del values["files"], values["xxh3"]
    (folder / "manifest.json").write_text(json.dumps(values | {"version": 1}))
