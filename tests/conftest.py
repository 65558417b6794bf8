"""For all tests."""

from __future__ import annotations

import sys
from pathlib import Path

from hypothesis import HealthCheck, settings

# Where test.sh puts what is only compared with; last, so that it hides nothing.
sys.path.append(str(Path(sys.prefix) / "oracles"))

# How long an example takes says more about what else the machine does than about the code.
settings.register_profile("searchr1", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("searchr1")
