"""pyqe bench"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from pyqe._files import atomic_path
from pyqe.cli.options import option_group

_SHARED = ("head", "sampling", "loss", "logits")
SUITES = {  # by device; on a GPU those with a bar to meet come first, as its time may end
    "cpu": (*_SHARED, "temperature", "generate", "overhead"),
    "cuda": (*_SHARED, "overhead", "temperature", "crossover"),
}
_EVERY_SUITE = tuple(dict.fromkeys(SUITES["cpu"] + SUITES["cuda"]))
_DTYPES = ("bf16", "fp16", "fp32")
_QUICK_REPEATS = 2
_REPEATS = {"cpu": 7, "cuda": 20}
_LOST = 75  # EX_TEMPFAIL: try again


@dataclass(frozen=True)
class Choice:
    """Which cases, and how often."""

    models: tuple[str, ...] | None
    n: tuple[str, ...] | None
    dtypes: tuple[str, ...] | None
    only: tuple[str, ...]
    without: tuple[str, ...] | None
    repeats: int | None
    threads: int | None
    quick: bool
    large: bool
    device: str

    def settings(self) -> Any:
        """The suites' settings.

        Raises:
            click.UsageError: an unknown model or dtype, or a number that is none.
        """
        from pyqe.bench.case import Settings, model_shape

        ctx = click.get_current_context()
        try:
            models = None if self.models is None else tuple(model_shape(name)[0] for name in self.models)
        except ValueError as error:
            raise click.BadParameter(str(error), ctx, param_hint="--models") from error
        if not all(number.isdecimal() and int(number) > 0 for number in self.n or ()):
            raise click.BadParameter("expected positive numbers", ctx, param_hint="--n")
        if not set(self.dtypes or ()) <= set(_DTYPES):
            raise click.BadParameter(f"expected some of {', '.join(_DTYPES)}", ctx, param_hint="--dtypes")
        return Settings(
            models=models,
            n=None if self.n is None else tuple(map(int, self.n)),
            dtypes=self.dtypes,
            repeats=self.repeats or (_QUICK_REPEATS if self.quick else _REPEATS[self.device]),
            only=self.only,
            without=frozenset(self.without or (("torch.compile",) if self.quick else ())),
            quick=self.quick,
            large=self.large,
            device=self.device,
        )

    def suites(self, named: Sequence[str]) -> Sequence[str]:
        """Those named, or all that the device has.

        Raises:
            click.UsageError: a suite that it does not have.
        """
        absent = set(named) - set(SUITES[self.device])
        if absent:
            raise click.UsageError(f"{', '.join(sorted(absent))}: not measured on {self.device}")
        return named or SUITES[self.device]


def _split(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    return None if value is None else tuple(part.strip() for part in value.split(","))


_choice_options = option_group(
    "choice",
    Choice,
    click.option("--models", metavar="LIST", callback=_split, help="Comma-separated names (see above) or VxD."),
    click.option("--n", metavar="LIST", callback=_split, help="Rows of hidden states, such as 1,8,512."),
    click.option("--dtypes", metavar="LIST", callback=_split, help="Some of bf16, fp16, fp32."),
    click.option("--only", metavar="TEXT", multiple=True, help="Cases with this in what --list calls them."),
    click.option(
        "--without", metavar="LIST", callback=_split, help="Rivals to leave out, such as torch.compile,authors."
    ),
    click.option("--device", type=click.Choice(tuple(SUITES)), default="cpu", show_default=True),
    click.option("--repeats", type=click.IntRange(1), help="Timed rounds; default 7, on a GPU 20, with --quick 2."),
    click.option("--threads", type=click.IntRange(1), help="Default torch's own."),
    click.option("--quick", is_flag=True, help="Small shapes without torch.compile: to see that everything runs."),
    click.option(
        "--large",
        is_flag=True,
        help="Also the temperature of 100,000 x 1,000 logits.",
    ),
)


@click.command("bench")
@click.argument("suites", nargs=-1, type=click.Choice(_EVERY_SUITE))
@_choice_options
@click.option("--json", "json_file", metavar="FILE", type=click.Path(path_type=Path), help="Everything measured.")
@click.option("--page", metavar="FILE", type=click.Path(path_type=Path), help="The tables as Markdown.")
@click.option("--plots", "folder", metavar="FOLDER", type=click.Path(path_type=Path), help="Figures as PNG and SVG.")
@click.option("--resume", is_flag=True, help="Keep the cases that the JSON file has already.")
@click.option("--budget", metavar="SECONDS", type=float, default=float("inf"), help="Start no case after that.")
@click.option("--list", "list_only", is_flag=True, help="Name the cases that would run.")
def command(
    suites: Sequence[str],
    choice: Choice,
    json_file: Path | None,
    page: Path | None,
    folder: Path | None,
    resume: bool,
    budget: float,
    list_only: bool,
) -> None:
    """Measure pyqe beside its rivals on this machine; all suites if none is named.

    Rivals take turns (A B C A B C ...) on new inputs; figures are medians with quartiles, memory comes from a run of
    its own. Rivals that are not installed are named as missing: pip install 'pyqe[bench]'. The JSON file grows with
    every case, so an interruption keeps what was measured, and --resume goes on from there. On a GPU each backend
    takes part beside the one that is chosen by itself.

    Exit code 1: pyqe failed somewhere; 75: the GPU has to be taken up by a new process, with --resume.

    Models: SmolLM2-135M, Qwen3-0.6B, Llama-3.2-1B, Llama-3-8B, Gemma-2-2B.

    \b
    pyqe bench --quick
    pyqe bench head --models Llama-3.2-1B,Qwen3-0.6B --n 1,8,64,512 --json head.json --plots plots
    pyqe bench --device cuda --json gpu.json --resume
    """
    settings, chosen = choice.settings(), choice.suites(suites)
    import torch

    from pyqe.bench import plots, run
    from pyqe.bench.run import planned

    cases = planned(chosen, settings)
    if not cases:
        raise click.BadParameter("no case has this in its name", click.get_current_context(), param_hint="--only")
    if list_only:
        click.echo("\n".join(cases))
        return
    if choice.device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("--device cuda: torch finds no GPU; --list names the cases without one")
    if folder is not None:
        plots.check()
    if choice.threads is not None:
        torch.set_num_threads(choice.threads)
    with _Display(json_file, page) as display:
        report = run(
            chosen,
            settings,
            on_start=display.start,
            on_case=display.case,
            on_progress=display.progress,
            earlier=_earlier(json_file) if resume else None,
            budget=budget,
        )
        display.write(report)
    if folder is not None:
        written = plots.write_plots(report, folder)
        message = f"{len(written)} files in {folder}" if written else "nothing: a line takes two --n or two --models"
        click.echo(f"pyqe: plots: {message}", err=True)
    _exit(report)


def _earlier(json_file: Path | None) -> dict[str, Any] | None:
    """The report that is to grow; None where there is none yet."""
    if json_file is None:
        raise click.UsageError("--resume: expected --json with the file to go on with")
    return json.loads(json_file.read_text(encoding="utf-8")) if json_file.exists() else None


def _exit(report: dict[str, Any]) -> None:
    from pyqe.bench.run import failures

    failed = failures(report)
    for line in failed:
        click.echo(f"pyqe: {line}", err=True)
    if report["lost"] or failed:
        raise SystemExit(_LOST if report["lost"] else 1)


class _Display:
    """Prints the cases as they come, writes the files, and moves the progress bar."""

    def __init__(self, json_file: Path | None, page: Path | None) -> None:
        from tqdm import tqdm

        self._json_file, self._page = json_file, page
        self._bar = tqdm(unit=" cases", disable=None, leave=False)

    def __enter__(self) -> _Display:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def start(self, report: dict[str, Any], cases: int) -> None:
        from pyqe.bench.table import machine_lines

        self._bar.reset(cases)
        self._print(machine_lines(report))

    def case(self, report: dict[str, Any], case: dict[str, Any]) -> None:
        from pyqe.bench.table import case_lines

        self._bar.update()
        self._print(["", *case_lines(case)])
        self.write(report)

    def write(self, report: dict[str, Any]) -> None:
        from pyqe.bench.bars import markdown

        if self._json_file is not None:
            _write(self._json_file, json.dumps(report, indent=1) + "\n")
        if self._page is not None:
            _write(self._page, markdown(report))

    def progress(self, text: str) -> None:
        self._bar.set_postfix_str(text)

    def _print(self, lines: list[str]) -> None:
        with self._bar.external_write_mode():
            click.echo("\n".join(lines))


def _write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
