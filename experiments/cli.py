"""The command ``fedmask``. Heavy libraries are imported inside the commands: --help answers at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import click
import typer

from fedmask.errors import FederationError, FedmaskError

app = typer.Typer(
    help="Fine-tune a pre-trained transformer across clients through one shared sparse mask.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout instead of tables.")]
RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN", help="Folder of a finished run, such as runs/demo.")
]


@app.command()
def run(
    config: Annotated[
        Path | None, typer.Option(help="TOML file, or a run's config.json (none: the demo's settings).")
    ] = None,
    model: Annotated[str | None, typer.Option(help="minilm (bundled), a folder, or a hub name.")] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="tweets:6, bbc:2, or name=N,source=FILE_OR_HUB_NAME,text=COL[+COL],label=COL,"
            "metric=M,clients=K. Repeatable."
        ),
    ] = None,
    clients: Annotated[
        int | None, typer.Option(help="Clients in all, dealt to the tasks in the proportion that they have.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="What is trained: pafi+hiwi, pafi, hiwi, ...")] = None,
    density: Annotated[
        float | None, typer.Option(help="Share of eligible entries in the mask, in (0, 1].")
    ] = None,
    eligible: Annotated[str | None, typer.Option(help="linear, linear+embeddings or all.")] = None,
    per_tensor: Annotated[
        bool | None, typer.Option("--per-tensor", help="The density holds in every tensor, not overall.")
    ] = None,
    head: Annotated[
        str | None, typer.Option(help="mean (linear on mean of states) or hf (the model's own).")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Number of rounds.")] = None,
    partition: Annotated[
        str | None, typer.Option(help="dirichlet, pathological, shard, quantity, iid or natural.")
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="Dirichlet concentration: small is skewed.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of LoRA's factors.")] = None,
    lr: Annotated[
        float | None,
        typer.Option(help="Learning rate of all that trains but the adapters on biases (--adapter-lr)."),
    ] = None,
    adapter_lr: Annotated[float | None, typer.Option(help="Learning rate of the adapters on biases.")] = None,
    epochs: Annotated[
        float | None,
        typer.Option(help="Passes over a client's rows per round; without --steps nothing cuts them short."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="At most so many steps per client and round.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows per step.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Texts are cut at so many tokens.")] = None,
    strategy: Annotated[str | None, typer.Option(help="fedavg, fedadam, fedmedian, krum, ...")] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="Setting of the strategy as key=value. Repeatable.")
    ] = None,
    clients_per_round: Annotated[int | None, typer.Option(help="Clients a round (none: all).")] = None,
    over_select: Annotated[float | None, typer.Option(help="Ask so many times --clients-per-round.")] = None,
    min_replies: Annotated[int | None, typer.Option(help="Fewer usable replies end the run.")] = None,
    round_deadline: Annotated[float | None, typer.Option(help="Seconds until a round closes.")] = None,
    up: Annotated[
        str | None, typer.Option(help="How changes travel to the server: fp32, fp16, int8, int4+ef, ...")
    ] = None,
    down: Annotated[
        str | None, typer.Option(help="How values travel to the clients: fp32, fp16, int4+delta, ...")
    ] = None,
    budget_bytes: Annotated[
        int | None, typer.Option(help="Bytes a client and round: chooses up, down, if need be density.")
    ] = None,
    mask_schedule: Annotated[str | None, typer.Option(help="fixed, rotate or anneal: a moving mask.")] = None,
    placement: Annotated[str | None, typer.Option(help="Whose rows choose: client, agreed, server.")] = None,
    mask_transport: Annotated[str | None, typer.Option(help="recipe (under 256 bytes) or packed.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32, bf16 or auto (measured before round 1): the frozen backbone's.")
    ] = None,
    eval_rows: Annotated[
        int | None, typer.Option(help="At most so many dev rows a round, of all tasks.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every random choice.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads a client; part of the last bits.")] = None,
    workers: Annotated[int | None, typer.Option(help="Clients that train at the same time.")] = None,
    engine: Annotated[str, typer.Option(help="inprocess, ray or superlink.")] = "inprocess",
    backend: Annotated[
        str | None,
        typer.Option(help="Engine ray: Flower's backend config (client_resources, init_args) as JSON."),
    ] = None,
    connection: Annotated[
        str | None,
        typer.Option(
            help="Engine superlink: HOST:PORT, or a connection of Flower's config.toml (none: its default)."
        ),
    ] = None,
    root_certificates: Annotated[
        Path | None, typer.Option(help="Engine superlink at HOST:PORT: the CA's certificate (none: no TLS).")
    ] = None,
    federation_config: Annotated[
        str | None, typer.Option(help="Engine superlink: passed on to flwr run, e.g. 'num-supernodes=8'.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other setting as dotted.key=value (none clears it). Repeatable."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run and of its folder.")] = None,
    runs_dir: Annotated[str | None, typer.Option(help="Folder of the runs' folders.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing run of this name.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the interrupted run of this name.")
    ] = False,
    json: Json = False,
) -> None:
    """Run a federation and write runs/NAME."""
    from experiments.launch import Engine, run_federation, within_budget
    from experiments.options import KEYS, build_config, with_absolute_paths

    given = locals()
    asked = {key: given[key] for key in KEYS}
    if resume and config is None and engine != "superlink":  # there, the folder may lie on another machine
        from experiments.runs import stored_settings

        config, asked = stored_settings(asked)
    settings = build_config(config, asked, task or (), option or (), set_ or (), clients)
    settings = within_budget(settings, budget_bytes, asked)
    chosen = Engine(engine, backend, connection, federation_config, overwrite, resume, root_certificates)
    if engine != "superlink":  # its nodes read files below folders of their own
        settings = with_absolute_paths(settings)
    run_federation(settings, chosen, as_json=json)


@app.command()
def mask(
    model: Annotated[str, typer.Argument(help="minilm (bundled), a folder, or a hub name.")],
    density: Annotated[float, typer.Option(help="Share of eligible entries, in (0, 1].")] = 0.005,
    eligible: Annotated[str, typer.Option(help="linear, linear+embeddings or all.")] = "linear",
    per_tensor: Annotated[
        bool, typer.Option("--per-tensor", help="The density holds in every tensor.")
    ] = False,
    json: Json = False,
) -> None:
    """Derive a model's mask and describe it."""
    from experiments.commands import show_mask

    show_mask(model, density=density, eligible=eligible, per_tensor=per_tensor, as_json=json)


@app.command()
def export(
    run: RunFolder,
    to: Annotated[Path, typer.Option(help="Folder that gets one folder a task.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what an older export wrote.")
    ] = False,
    json: Json = False,
) -> None:
    """Write a run as Hugging Face checkpoints."""
    from experiments.commands import export_run

    export_run(run, to, overwrite=overwrite, as_json=json)


@app.command()
def report(
    run: RunFolder,
    beside: Annotated[Path | None, typer.Option(help="Another run on the same shards.")] = None,
    json: Json = False,
) -> None:
    """Write a run's report and figures again."""
    from experiments.commands import rebuild_report

    rebuild_report(run, beside, as_json=json)


@app.command()
def ledger(
    run: RunFolder,
    by: Annotated[
        str | None,
        typer.Option(help="Sums alone, over any of round, client, direction, kind, status (by commas)."),
    ] = None,
    json: Json = False,
) -> None:
    """Say what a run's messages weighed, beside the formula and other ways."""
    from experiments.commands import show_ledger

    show_ledger(run, by, as_json=json)


@app.command()
def compare(
    study: Annotated[
        Path | None,
        typer.Argument(metavar="STUDY", help="TOML file of a study (experiments/studies/compare)."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="The embedded default's tasks on a small budget.")
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder that the study's files lie in (none: the variable FEDMASK_DATA)."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the results (none: runs/compare/NAME).")] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Run this variant, not all. Repeatable, or comma-separated.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Runs at the same time, a process and a thread each.")] = 1,
    retry: Annotated[bool, typer.Option("--retry", help="Run again what has failed.")] = False,
    report_only: Annotated[
        bool, typer.Option("--report", help="Run nothing: write tables and figures of what is there.")
    ] = False,
    json: Json = False,
) -> None:
    """Compare methods: run what is left of a study, then write its tables and figures."""
    from experiments.compare.command import compare as compare_methods

    names = [name.strip() for text in only or () for name in text.split(",") if name.strip()]
    compare_methods(
        study, quick=quick, data=data, out=out, only=names, jobs=jobs, retry=retry, report_only=report_only,
        as_json=json,
    )  # fmt: skip


@app.command()
def overlap(
    config: Annotated[
        Path | None, typer.Option(help="TOML file, or a run's config.json (none: the demo's settings).")
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="As in fedmask run. Repeatable.")] = None,
    rule: Annotated[
        str, typer.Option(help="How each client chooses its mask: gradient, fish, ...")
    ] = "gradient",
    density: Annotated[float | None, typer.Option(help="Share of eligible entries, in (0, 1].")] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Dirichlet concentration: small is more skewed.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every random choice.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any other setting as dotted.key=value. Repeatable.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the figures and of overlap.json.")] = Path(
        "runs/overlap"
    ),
    json: Json = False,
) -> None:
    """Show how far task-specific masks of the clients overlap, and what their union costs."""
    from experiments.options import build_config

    given = {"density": density, "alpha": alpha, "seed": seed}
    settings = build_config(config, given, task or (), (), set_ or ())
    from experiments.overlap import show_overlap

    show_overlap(settings, rule, out, as_json=json)


@app.command()
def estimate(
    config: Annotated[
        Path | None, typer.Option(help="TOML file, or a run's config.json (none: the demo's settings).")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="roberta-large, ... (built in), a folder, or a hub name.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="What is trained: pafi+hiwi, pafi, hiwi, ...")] = None,
    density: Annotated[
        float | None, typer.Option(help="Share of eligible entries in the mask, in (0, 1].")
    ] = None,
    head: Annotated[str | None, typer.Option(help="mean or hf (the model's own).")] = None,
    clients: Annotated[
        int | None, typer.Option(help="One task with so many clients, instead of the settings' tasks.")
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="As for run. Repeatable.")] = None,
    labels: Annotated[
        str | None,
        typer.Option(help="Labels of the task (a regression: 1), or tweets=3,bbc=5 (none: read the rows)."),
    ] = None,
    clients_per_round: Annotated[int | None, typer.Option(help="Clients a round (none: all).")] = None,
    rounds: Annotated[int | None, typer.Option(help="Number of rounds.")] = None,
    up: Annotated[str | None, typer.Option(help="How changes travel to the server, as for run.")] = None,
    down: Annotated[str | None, typer.Option(help="How values travel to the clients, as for run.")] = None,
    mask_transport: Annotated[str | None, typer.Option(help="recipe (under 256 bytes) or packed.")] = None,
    link: Annotated[
        str, typer.Option(help="Each client's link: UP/DOWN in Mbit/s, or lte, dsl, cable, lan.")
    ] = "10/50",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any other setting as dotted.key=value. Repeatable.")
    ] = None,
    json: Json = False,
) -> None:
    """Say what a run would send and how long that takes, from shapes alone."""
    from experiments.options import KEYS, build_config

    given = locals()
    asked = {key: given[key] for key in KEYS if key in given}
    if clients is not None:
        if task:
            raise click.UsageError("--clients is one task's; give the clients of each --task in it")
        task, labels = [f"task:{clients}"], labels or "2"
    settings = build_config(config, asked, task or (), (), set_ or ())
    from experiments.commands import show_estimate

    show_estimate(settings, labels, link, as_json=json)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; what a user got wrong becomes one line on stderr and exit code 2."""
    try:
        code: Any = app(args=arguments, standalone_mode=False)
    except FederationError as error:
        code = _fail(str(error), code=1)  # not the user's mistake: the run itself failed
    except (FedmaskError, OSError) as error:
        code = _fail(str(error))
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()  # its message is the whole help
        code = error.exit_code
    except click.ClickException as error:
        code = _fail(error.format_message())
    except (click.Abort, KeyboardInterrupt):
        print("fedmask: stopped", file=sys.stderr)
        code = 130
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int = 2) -> int:
    print("fedmask: " + " ".join(message.split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
