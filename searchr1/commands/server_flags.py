"""Flags that every command with an HTTP server has, with one spelling and one meaning."""

from __future__ import annotations

import argparse

Flags = argparse.ArgumentParser | argparse._ArgumentGroup


def add_address_flags(parser: Flags, port: int, saved: str | None = None) -> None:
    """Add --host and --port, and --save-address-to for a server that can be used from the moment `saved` on."""
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, default=port, help=f"0 takes a free one (default {port})")
    if saved is not None:
        parser.add_argument(
            "--save-address-to", help=f"write host:port into this file, or into a file in this folder, once {saved}"
        )


def add_host_names_flag(parser: Flags) -> None:
    """Add --allow-host, for a server that browsers use."""
    parser.add_argument(
        "--allow-host",
        "--allowed-host",
        "--allowed_host",
        action="append",
        default=[],
        metavar="NAME",
        help="a further name by which browsers may reach the server; IP addresses, localhost, the name of this machine and "
        "--host are accepted anyway",
    )
