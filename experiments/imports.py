"""Import what a federation imports, for the image: ``python imports.py``.

The file system of a container is read-only and each message starts a process, so bytecode must be there
before. That of every module of every package would be 300 MB; this brings about what is needed, and no more.
Only libraries: the image keeps them apart from the project's code.
"""

import contextlib
import importlib
import os
import subprocess
import sys
from pathlib import Path

_PROGRAMS = ("flower-superlink", "flower-superexec", "flower-supernode", "flwr-serverapp", "flwr-clientapp")
_MODULES = (
    "cryptography.x509", "datasets", "flwr.cli.app", "flwr.cli.run.run", "flwr.cli.ls", "flwr.cli.log",
    "flwr.clientapp", "flwr.serverapp", "flwr_datasets.partitioner", "httpx", "jinja2", "matplotlib.pyplot",
    "matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg", "numba", "pandas", "pydantic",
    "pyarrow.parquet", "safetensors.numpy", "safetensors.torch", "scipy.stats", "sklearn.metrics",
    "sqlalchemy.orm", "tokenizers", "torch.func", "typer", "uvicorn.protocols.http.auto",
)  # fmt: skip
_MODELS = ("bert", "roberta", "xlm_roberta", "distilbert", "gpt2", "opt", "t5", "llama")


def _train() -> None:
    """A step of training: torch imports a part of itself with the first one."""
    import torch

    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()


def main() -> None:
    """Import all; what an optional part of the installation lacks is left out."""
    for name in [*_MODULES, *(f"transformers.models.{name}.modeling_{name}" for name in _MODELS)]:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
    _train()
    for program in _PROGRAMS:
        words = [str(Path(sys.executable).parent / program), "--help"]
        subprocess.run(words, stdout=subprocess.DEVNULL, check=True)


if __name__ == "__main__":
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    main()
