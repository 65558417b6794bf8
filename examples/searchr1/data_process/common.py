"""What the scripts of this folder share: Search-R1's flags, handed on to `searchr1 prepare-data`."""

from __future__ import annotations

import argparse

from searchr1.cli import main


def run(what: str, split: str, local_dir: str, template: str = "searchr1", sets: str | None = None) -> int:
    """Prepare data. Flags that are not Search-R1's go to `searchr1 prepare-data` as they are (see its --help).

    Args:
        what: one line for --help.
        split: as in `searchr1 prepare-data`.
        local_dir: default of --local_dir.
        template: what --template_type base means here.
        sets: default of --data_sources; None where the script is for NQ alone.
    """
    parser = argparse.ArgumentParser(description=f"{what} Further flags: searchr1 prepare-data --help", allow_abbrev=False)
    parser.add_argument("--local_dir", default=local_dir, help="folder of the files (default: %(default)s)")
    parser.add_argument("--template_type", default="base", help=f"base ({template}), or a template of docs/guides/data.md")
    if sets:
        parser.add_argument("--data_sources", default=sets, help="comma-separated (default: %(default)s)")
    args, further = parser.parse_known_args()
    chosen = template if args.template_type == "base" else args.template_type
    words = ["--sets", args.data_sources if sets else "nq", "--split", split, "--template", chosen, "--out", args.local_dir]
    return main(["prepare-data", *words, *further])
