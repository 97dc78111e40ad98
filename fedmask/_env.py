"""Switches that must stand in the environment before Flower and Ray are imported. Imports nothing of either.

A federation must not talk to anyone but its own members: no usage reports, no update check, no
installation of packages at run time, and no service that converts a model. What the user has set already is
kept.
"""

from __future__ import annotations

import os

SWITCHES = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    # transformers would name a model without safetensors, and the user's token, to a converter in the net.
    "DISABLE_SAFETENSORS_CONVERSION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray would otherwise hide accelerators from actors that ask for none; newer versions leave them alone.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}

for _name, _value in SWITCHES.items():
    os.environ.setdefault(_name, _value)
