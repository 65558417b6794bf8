"""The YAML tree: its schema, loading, and the translation of RLinf's keys."""

from typing import TYPE_CHECKING

from searchr1.exports import export

if TYPE_CHECKING:
    from searchr1.config.load import ConfigError, load_config, save_config
    from searchr1.config.schema import Config
else:
    __getattr__, __dir__ = export(
        __name__,
        {
            "load": ["ConfigError", "load_config", "save_config"],
            "schema": ["Config"],
        },
    )

__all__ = [
    "Config",
    "ConfigError",
    "load_config",
    "save_config",
]
