"""The command line: `flowhelpers run`, `paper`, `lab`, `notebooks`, `explore` and so on.

A subcommand is a function of its arguments that returns an exit status. It imports what it needs
itself, so that `flowhelpers --help` answers at once.
"""

import argparse
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from flowhelpers import __version__

RUN_NOTES = """examples:
  flowhelpers run                               every notebook, as it stands
  flowhelpers run 01 -p suite=flowlet k=5       one notebook, by its number
  flowhelpers run --preset quick --out /tmp/r   the quick settings
  flowhelpers run --resume                      take up what was stopped last
  flowhelpers run 01 --grid grid.yaml --out g   every combination of parameters, on Dask
"""
LAB_NOTES = """
The notebooks are copied to ./flowhelpers-notebooks, where you may change them: what lies there
already stays as it is, and runs go to ./runs. Any other option goes on to JupyterLab, whose own
are listed by `jupyter lab --help`.

examples:
  flowhelpers lab                              in this folder, with a browser
  flowhelpers lab --no-browser --port 8890     on a machine that you reach by ssh
  flowhelpers lab --ip 0.0.0.0                 for other machines too
"""
SUITES_NOTES = """
`flowhelpers suites NAME` says what one needs. A variant is asked for as in gemma-2-2b@65k; of
Gemma 2, SAEs by their mean L0 as in gemma-2-2b@l0=70; of any suite, some modules alone as in
flowlet@res+mlp. Where att reads z, W_O brings it into the stream."""


def run(arguments: argparse.Namespace) -> int:
    """Executes notebooks, or takes up an execution that was stopped."""
    from flowhelpers.core.versions import untried

    for sentence in untried():
        print(f"flowhelpers: {sentence}", file=sys.stderr)
    out, at = Path(arguments.out), ("cluster", "workers", "timeout", "yes")
    on_dask = {name: getattr(arguments, name) for name in at}
    if arguments.resume is not None:
        more = ("notebooks", "parameters", "preset", "name", "grid")
        if any(getattr(arguments, name) for name in more):
            raise ValueError("--resume goes on with what was asked for before: give no more to it")
        if arguments.resume.endswith("grid.json"):
            from flowhelpers.runs.grid import resume_grid

            return resume_grid(arguments.resume, **on_dask)
        from flowhelpers.runs.execute import resume

        manifest = Path(arguments.resume) if arguments.resume else None
        if manifest and not manifest.is_file():
            raise ValueError(f"--resume takes the manifest of a run, a .json file: {manifest}")
        return resume(out, manifest, timeout=arguments.timeout)
    given = dict(_assignment(text) for text in arguments.parameters)
    if arguments.grid:
        from flowhelpers.runs.grid import combinations, run_grid

        if arguments.name:
            raise ValueError("--name: the runs of a --grid are named by what they are of")
        asked = (arguments.notebooks, arguments.grid, given, arguments.preset)
        return run_grid(combinations(*asked), arguments.out, **on_dask)
    if arguments.cluster or arguments.workers or "://" in arguments.out:
        raise ValueError("--cluster, --workers and addresses such as s3://… are for a --grid")
    from flowhelpers.runs.parameters import plan

    planned = plan(arguments.notebooks, given, arguments.preset)
    from flowhelpers.runs.execute import run_notebooks

    status = run_notebooks(planned, out, name=arguments.name, timeout=arguments.timeout)
    if arguments.preset == "paper":
        paper_numbers(argparse.Namespace(runs=out))
    return status


def paper_numbers(arguments: argparse.Namespace) -> int:
    """Writes the page of the paper's printed numbers beside those of the latest runs."""
    from flowhelpers.paper_page import write_page

    print(write_page(arguments.runs))
    return 0


def lab(arguments: argparse.Namespace) -> int:
    """Opens JupyterLab on a copy of the notebooks in the folder where this was called."""
    from flowhelpers.runs.lab import CONFIG, lab_command
    from flowhelpers.runs.run import RUNS

    os.environ.setdefault(RUNS, str(Path.cwd() / "runs"))
    paths = [os.environ.get("JUPYTER_CONFIG_PATH"), str(CONFIG)]  # the user's own comes first
    os.environ["JUPYTER_CONFIG_PATH"] = os.pathsep.join(filter(None, paths))
    command = lab_command(Path.cwd(), arguments.rest)
    sys.stdout.flush()
    os.execv(sys.executable, command)


def notebooks(arguments: argparse.Namespace) -> int:
    """Lists the notebooks and their parameters."""
    from flowhelpers.runs.parameters import find_notebooks, inspect

    for notebook in find_notebooks(arguments.notebooks):
        print(notebook.stem)
        for each in inspect(notebook).values():
            print(f"  {each.name}: {each.type} = {each.default!r}".ljust(48), each.help)
    return 0


def explore(arguments: argparse.Namespace) -> int:
    """Writes the explorer of a suite as one page."""
    import pandas as pd

    from flowhelpers.explorer import check_page, write_page
    from flowhelpers.labels.describe import read_labels
    from flowhelpers.labels.neuronpedia import neuronpedia_labels
    from flowhelpers.suites.load import load_suite

    suite = load_suite(arguments.suite)
    check_page(suite, arguments.features, arguments.html)
    labels = [neuronpedia_labels(suite)] if arguments.fetch_labels else []
    labels += [read_labels(arguments.labels, suite)] if arguments.labels else []
    known = pd.concat(labels) if labels else None  # of several of a feature, the last
    print(write_page(suite, arguments.features, arguments.html, known, arguments.writes))
    return 0


def suites(arguments: argparse.Namespace) -> int:
    """Lists the suites, or says of one what it holds, what memory it takes and how long jobs do."""
    from flowhelpers.core.machine import check_device
    from flowhelpers.suites.load import check_sources, decoders_memory, memory_needed
    from flowhelpers.suites.registry import find_suite, registered

    if arguments.time and not arguments.suite:
        raise ValueError("--time takes the name of a suite")
    if arguments.device != "auto":
        check_device(arguments.device)
    if not arguments.suite:
        for row in registered().values():
            where = "no network needed" if row.is_local else "from the hub, then cached"
            print(f"{row.name:<22}{row.about}\n{'':<22}{len(row.saes)} SAEs; {where}")
            if len(row.variants) > 1:
                print(f"{'':<22}variants: {', '.join(row.variants)}")
        print(SUITES_NOTES)
        return 0
    row = find_suite(arguments.suite)
    check_sources(row)
    features = f" of {row.features:,} features" if row.features else ""
    print(f"{row.name}\n{row.about}\n\nmodel {row.model}; {len(row.saes)} SAEs{features}")
    if row.parameters:
        matching, whole = decoders_memory(row) / 2**30, memory_needed(row) / 2**30
        print(f"in float32 it takes {whole:.1f} GiB of memory as a whole, {matching:.1f} to match")
    for note in row.notes:
        print(textwrap.fill(f"- {note}", 90, subsequent_indent="  "))
    for site, source in sorted(row.saes.items()):
        named = source if isinstance(source, str) else f"{source['release']}/{source['id']}"
        print(f"  {site!s:<10}{named}", row.neuronpedia.get(site, ""), sep="  ")
    return _print_forecast(arguments.suite, arguments.device) if arguments.time else 0


def _print_forecast(name: str, device: str) -> int:
    from tqdm import tqdm

    from flowhelpers.forecast import forecast

    def spoken(seconds: float) -> str:
        return tqdm.format_interval(seconds) if seconds >= 60 else f"{seconds:.3g} s"

    table = forecast(name, device)
    print("\nwhat jobs take here, each step timed on random numbers of these shapes (h:mm:ss):")
    told = table.assign(seconds=table["seconds"].map(spoken), total=table["total"].map(spoken))
    print(told.rename(columns={"seconds": "one"}).to_string(index=False))
    print(
        "Texts are of 128 tokens. Fetching SAEs, reading them from disk and Pearson's correlations"
        "\nare not counted."
    )
    for step, why in table.attrs["left_out"].items():
        print(textwrap.fill(f"- not timed: {step}, as {why}", 90, subsequent_indent="  "))
    return 0


def train(arguments: argparse.Namespace) -> int:
    """Trains a suite, or SAEs for a model that is there already."""
    from flowhelpers.training.recipe import train_suite

    sites = None if arguments.sites is None else arguments.sites.split(",")
    folder = train_suite(
        arguments.folder, arguments.text, arguments.recipe, arguments.model, arguments.device, sites
    )
    print(folder)
    return 0


def card(arguments: argparse.Namespace) -> int:
    """Prints the figures of a suite's card, or measures them afresh."""
    afresh = arguments.measure or arguments.rows
    if arguments.write and not afresh:
        raise ValueError("--write writes what was measured: give --measure or --rows as well")
    from flowhelpers.training.card import measured_bars, stored_bars

    if afresh:
        figures = measured_bars(arguments.suite, arguments.rows, arguments.write)
    else:
        figures = stored_bars(arguments.suite)
    for name, bars in figures.items():
        asked = bars[["at_least", "at_most"]].notna().any(axis=1).sum()
        print(f"measured on {name}: {asked} bars were set, {(~bars['met']).sum()} missed")
        print(bars.to_string(na_rep="", float_format="{:.3f}".format))
    return 0


def parser() -> argparse.ArgumentParser:
    """The arguments that each subcommand takes."""
    top = argparse.ArgumentParser("flowhelpers", description="Feature flow through a model.")
    top.add_argument("--debug", action="store_true", help="show the traceback of an error")
    top.add_argument("--version", action="version", version=f"flowhelpers {__version__}")
    commands = top.add_subparsers(required=True, metavar="command")

    one = commands.add_parser(
        "run",
        help="execute notebooks",
        epilog=RUN_NOTES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    one.set_defaults(function=run)
    add = one.add_argument
    add("notebooks", nargs="*", metavar="notebook", help="name, number or path; all if none")
    add("-p", dest="parameters", nargs="+", action="extend", default=[], metavar="name=value",
        help="parameters, each for every notebook that has it")  # fmt: skip
    add("--preset", help="settings of notebooks/presets.yaml: quick, paper")
    add("--out", default="runs", help="where runs go (default: runs); of a grid also s3://… etc.")
    add("--name", help="a word to tell this run's folders from others")
    add("--timeout", type=_seconds, metavar="SECONDS", help="the longest that a cell may take")
    add("--resume", nargs="?", const="", metavar="MANIFEST",
        help="take up the latest unfinished execution in --out, or that of a manifest")  # fmt: skip
    add("--grid", type=Path, metavar="YAML", help="run all combinations: parameter: [values]")
    add("--workers", type=int, metavar="N", help="so many of this machine for a grid")
    add("--cluster", metavar="ADDRESS", help="a Dask scheduler's, whose workers run the grid")
    add("--yes", action="store_true", help="start a grid of more than 1,000 runs")

    one = commands.add_parser("paper", help="the paper's printed numbers beside those of runs")
    one.set_defaults(function=paper_numbers)
    one.add_argument("runs", type=Path, nargs="?", default=Path("runs"), metavar="RUNS",
                     help="the folder of the runs, of each notebook the latest")  # fmt: skip

    one = commands.add_parser(
        "lab",
        help="open JupyterLab on a copy of the notebooks",
        usage="flowhelpers lab [-h] [options of JupyterLab ...]",
        epilog=LAB_NOTES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    one.set_defaults(function=lab)

    one = commands.add_parser("notebooks", help="list the notebooks and their parameters")
    one.set_defaults(function=notebooks)
    one.add_argument("notebooks", nargs="*", metavar="notebook")

    one = commands.add_parser("explore", help="write the explorer of a suite as one page")
    one.set_defaults(function=explore)
    add = one.add_argument
    add("suite", help="a registered name or a folder with a suite.yaml")
    add("features", nargs="*", metavar="feature", help="where it starts, such as 4/res/44; of a"
        " large suite, what it holds the neighbourhood of")  # fmt: skip
    add("--html", type=Path, required=True, metavar="FILE", help="the page, of at most 15 MB")
    add("--labels", type=Path, metavar="CSV", help="your own labels: columns feature and label")
    add("--fetch-labels", action="store_true", help="fetch Neuronpedia's labels, which are kept")
    add("--writes", action="store_true", help="of a large suite: load the model, and add what"
        " features write; of a small one it is there")  # fmt: skip

    one = commands.add_parser("suites", help="list the suites, or show one")
    one.set_defaults(function=suites)
    add = one.add_argument
    add("suite", nargs="?", help="a registered name or a folder with a suite.yaml")
    add("--time", action="store_true", help="time single steps, and foretell what jobs take here")
    add("--device", default="auto", help="where --time runs them")

    one = commands.add_parser("train", help="train a suite, or SAEs for your own model")
    one.set_defaults(function=train)
    add = one.add_argument
    add("folder", type=Path, help="where the suite goes; called again, training is taken up there")
    add("--text", type=Path, metavar="FOLDER", help="where the recipe's text files lie")
    add("--recipe", type=Path, metavar="YAML", help="a recipe file (default: the one of flowlet)")
    add("--model", help="a Hugging Face folder or name: train SAEs for it alone")
    add("--sites", metavar="att,12/res", help="modules or single sites: train SAEs for these alone")
    add("--device", default="auto", help="torch device (default: a GPU if there is one)")

    one = commands.add_parser(
        "card",
        help="the figures of a suite: print, or measure afresh",
        epilog="Beside each figure stands what the suite's bars.yaml asks for, if it has one. A bar"
        " that is not met is a fact about the suite and no error: the exit status is 0.",
    )
    one.set_defaults(function=card)
    one.add_argument("suite", nargs="?", default="flowlet")
    one.add_argument("--measure", action="store_true",
                     help="measure on the package's passages and held-out Python")  # fmt: skip
    one.add_argument("--rows", type=Path, metavar="FOLDER",
                     help="measure on held-out rows of this training folder as well")  # fmt: skip
    one.add_argument("--write", action="store_true", help="write card.json")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; returns its exit status, 2 for a mistake of the caller's.

    A mistake is told in its message alone, unless `--debug` asks for the traceback.
    """
    arguments, rest = parser().parse_known_args(argv)
    if rest and arguments.function is not lab:
        parser().error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.rest = rest
    try:
        return arguments.function(arguments)
    except BrokenPipeError:  # whoever read it has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, MemoryError, FloatingPointError) as error:
        if arguments.debug:
            raise
        print(f"flowhelpers: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _seconds(text: str) -> int:
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"expected a whole number of seconds from 1, got {text!r}")
    return int(text)


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (equals and name):
        raise ValueError(f"-p takes name=value, not {text!r} (notebooks go before -p)")
    return name, value


if __name__ == "__main__":
    sys.exit(main())
