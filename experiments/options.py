"""From what a user types to a RunConfig: the TOML file first, then each option that was given."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedmask.config import RunConfig, TaskConfig, from_dict, read_toml
from fedmask.errors import ConfigError, unknown

STUDIES = Path(__file__).parent / "studies"
DEMO = STUDIES / "demo.toml"

# Option of the command line -> key of the config. Everything else is reached with --set.
KEYS = {
    "name": "name",
    "runs_dir": "runs_dir",
    "seed": "seed",
    "model": "model",
    "head": "head",
    "method": "method",
    "density": "density",
    "eligible": "eligible",
    "per_tensor": "per_tensor",
    "mask_schedule": "mask_schedule",
    "placement": "placement",
    "mask_transport": "mask_transport",
    "up": "up",
    "down": "down",
    "precision": "precision",
    "rounds": "rounds",
    "threads": "threads",
    "workers": "workers",
    "eval_rows": "eval_rows",
    "partition": "partition.kind",
    "alpha": "partition.alpha",
    "rank": "lora.rank",
    "lr": "train.lr",
    "adapter_lr": "train.adapter_lr",
    "epochs": "train.epochs",
    "steps": "train.steps",
    "batch_size": "train.batch_size",
    "max_tokens": "train.max_tokens",
    "strategy": "server.strategy",
    "clients_per_round": "server.clients_per_round",
    "over_select": "server.over_select",
    "min_replies": "server.min_replies",
    "round_deadline": "server.timeout",
}


def build_config(
    path: Path | None,
    given: Mapping[str, Any],
    tasks: Iterable[str] = (),
    options: Iterable[str] = (),
    sets: Iterable[str] = (),
    clients: int | None = None,
) -> RunConfig:
    """The config of one run.

    ``path`` is a TOML file or a run's ``config.json`` (None: the demo); ``given`` maps option names
    (see ``KEYS``) to values, None meaning "not given"; ``tasks`` are task specs that replace the file's
    tasks; ``options`` are ``key=value`` for the server's strategy; ``sets`` are ``dotted.key=value``.
    ``clients`` are dealt to the tasks, see ``deal_clients``.
    ``epochs`` without ``steps`` lifts the file's cap on the steps, which would silently win otherwise.
    Raises ConfigError.
    """
    values = read_settings(path or DEMO)
    if path is None:
        values["name"] = "run"  # only the demo itself may write to runs/demo
    if given.get("epochs") is not None:
        _put(values, "train.steps", None)
    for option, value in given.items():
        if value is not None:
            _put(values, KEYS[option], value)
    specs = [parse_task(spec) for spec in tasks]
    if specs:
        values["tasks"] = specs
    if clients is not None:
        deal_clients(values["tasks"], clients)
    for text in options:
        key, value = _pair(text, "--option")
        _put(values, f"server.options.{key}", _toml_value(value))
    for text in sets:
        key, value = _pair(text, "--set")
        _put(values, key, _toml_value(value))
    try:
        return from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}" if path else str(error)) from None


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The same run with the names of local folders and files made absolute.

    So a run's ``config.json`` can be exported or run again from any folder. Bundled and hub names stay.
    """
    tasks = []
    for task in config.tasks:
        local = task.is_local or task.own_data
        changes = {key: _absolute(getattr(task, key)) for key in ("source", "dev", "test") if local}
        tasks.append(task.model_copy(update=changes))
    local_model = config.model != "minilm" and Path(config.model).expanduser().is_dir()
    model = _absolute(config.model) if local_model else config.model
    return config.model_copy(update={"model": model, "tasks": tuple(tasks)})


def deal_clients(tasks: list[dict[str, Any]], clients: int) -> None:
    """Set the tasks' numbers of clients to ``clients`` in all, in the proportion that they have now.

    Each task keeps one or more; what is left over goes to the largest remainders. Raises ConfigError.
    """
    if clients < len(tasks):
        raise ConfigError(f"--clients: expected {len(tasks)} or more, one for each task, found {clients}")
    before = [max(1, int(task.get("clients", 1))) for task in tasks]
    spare, whole = clients - len(tasks), sum(before)
    shares = [spare * count / whole for count in before]
    counts = [1 + int(share) for share in shares]
    order = sorted(range(len(tasks)), key=lambda number: (int(shares[number]) - shares[number], number))
    for number in order[: clients - sum(counts)]:
        counts[number] += 1
    for task, count in zip(tasks, counts, strict=True):
        task["clients"] = count


def _absolute(name: str) -> str:
    return str(Path(name).expanduser().absolute()) if name else name


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a TOML file, or in the ``config.json`` of an earlier run. Raises ConfigError."""
    if path.suffix != ".json":
        return read_toml(path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config file {path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ConfigError(f"config file {path}: expected JSON, found an error ({error})") from None
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
        raise ConfigError(f"config file {path}: expected a run's config.json with a part 'config'")
    return dict(record["config"])


def parse_task(spec: str) -> dict[str, Any]:
    """``tweets:6``, or ``name=reviews,source=rows.csv,text=title+body,label=stars,clients=4``.

    Two text columns (a pair of texts) are joined by ``+``. Raises ConfigError.
    """
    if "=" not in spec:
        name, colon, clients = spec.rpartition(":")
        if not colon or not name:
            raise ConfigError(f"--task {spec!r}: expected NAME:CLIENTS or name=NAME,...,clients=CLIENTS")
        return {"name": name, "clients": _count(spec, clients)}
    out: dict[str, Any] = {}
    for part in spec.split(","):
        key, value = _pair(part, "--task")
        if key == "partition" or key not in TaskConfig.model_fields:
            valid = [field for field in TaskConfig.model_fields if field != "partition"]
            raise ConfigError(f"--task {spec!r}: {unknown('key', key, valid)}")
        if key in out:
            raise ConfigError(f"--task {spec!r}: the key {key!r} is there twice")
        if key in ("text", "labels"):
            out[key] = value.split("+")
        elif key in ("clients", "most_rows"):
            out[key] = _count(spec, value)
        else:
            out[key] = _toml_value(value) if key == "own_data" else value
    return out


def _count(spec: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"--task {spec!r}: expected a number of clients, found {text!r}") from None


def _pair(text: str, option: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{option} {text!r}: expected key=value")
    return key.strip(), value.strip()


def _toml_value(text: str) -> Any:
    """``0.1``, ``true``, ``[1, 2]`` as TOML reads them; anything else is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except ValueError:
        return text


def _put(values: dict[str, Any], dotted: str, value: Any) -> None:
    *tables, last = dotted.split(".")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{dotted}: {table!r} is a list or a value, so it has no key {last!r}")
    values[last] = value
