"""Plan what `searchr1 infer` runs, from its flags."""

from __future__ import annotations

from searchr1.commands.flags import parser, plan_of

MODEL = "examples/demo/cold_start"


def planned(*argv):
    return plan_of(parser("infer", "").parse_args(["--model_path", MODEL, *argv]))
