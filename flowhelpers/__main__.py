"""The command line: `flowhelpers run`, `flowhelpers lab`, `flowhelpers notebooks`.

A subcommand is a function of its arguments that returns an exit status. It imports what it needs
itself, so that `flowhelpers --help` answers at once.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

RUN_NOTES = """examples:
  flowhelpers run                               every notebook, as it stands
  flowhelpers run 01 -p suite=flowlet k=5       one notebook, by its number
  flowhelpers run --preset quick --out /tmp/r   the quick settings
  flowhelpers run --resume                      take up what was stopped last
"""


def run(arguments: argparse.Namespace) -> int:
    """Executes notebooks, or takes up an execution that was stopped."""
    if arguments.resume is not None:
        if arguments.notebooks or arguments.parameters or arguments.preset or arguments.name:
            raise ValueError("--resume goes on with what was asked for before: give no more to it")
        from flowhelpers.execute import resume

        manifest = Path(arguments.resume) if arguments.resume else None
        if manifest and not manifest.is_file():
            raise ValueError(f"--resume takes the manifest of a run, a .json file: {manifest}")
        return resume(arguments.out, manifest, timeout=arguments.timeout)
    from flowhelpers.notebooks import plan

    given = dict(_assignment(text) for text in arguments.parameters)
    planned = plan(arguments.notebooks, given, arguments.preset)
    from flowhelpers.execute import run_notebooks

    return run_notebooks(planned, arguments.out, name=arguments.name, timeout=arguments.timeout)


def lab(arguments: argparse.Namespace) -> int:
    """Opens JupyterLab on the notebooks; runs go below the folder where this was called."""
    from flowhelpers.notebooks import notebooks_folder
    from flowhelpers.runs import RUNS

    os.environ.setdefault(RUNS, str(Path.cwd() / "runs"))
    command = [sys.executable, "-m", "jupyterlab", str(notebooks_folder()), *arguments.rest]
    os.execv(sys.executable, command)


def notebooks(arguments: argparse.Namespace) -> int:
    """Lists the notebooks and their parameters."""
    from flowhelpers.notebooks import find_notebooks
    from flowhelpers.parameters import inspect

    for notebook in find_notebooks(arguments.notebooks):
        print(notebook.stem)
        for each in inspect(notebook).values():
            print(f"  {each.name}: {each.type} = {each.default!r}".ljust(48), each.help)
    return 0


def parser() -> argparse.ArgumentParser:
    """The arguments that each subcommand takes."""
    top = argparse.ArgumentParser("flowhelpers", description="Feature flow through a model.")
    top.add_argument("--debug", action="store_true", help="show the traceback of an error")
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
    add("--out", type=Path, default=Path("runs"), help="where runs go (default: runs)")
    add("--name", help="a word to tell this run's folders from others")
    add("--timeout", type=int, metavar="SECONDS", help="the longest that a cell may take")
    add("--resume", nargs="?", const="", metavar="MANIFEST",
        help="take up the latest unfinished execution in --out, or that of a manifest")  # fmt: skip

    one = commands.add_parser("lab", help="open JupyterLab on the notebooks")
    one.set_defaults(function=lab)

    one = commands.add_parser("notebooks", help="list the notebooks and their parameters")
    one.set_defaults(function=notebooks)
    one.add_argument("notebooks", nargs="*", metavar="notebook")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; returns its exit status, 2 for an error of the caller's."""
    arguments, rest = parser().parse_known_args(argv)
    if rest and arguments.function is not lab:
        parser().error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.rest = rest
    try:
        return arguments.function(arguments)
    except (ValueError, OSError) as error:
        if arguments.debug:
            raise
        print(f"flowhelpers: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (equals and name):
        raise ValueError(f"-p takes name=value, not {text!r} (notebooks go before -p)")
    return name, value


if __name__ == "__main__":
    sys.exit(main())
