"""The command line: `torsion doctor | demo | bench`, also as `python -m torsion`.

Results go to standard output, progress and logs to standard error. Exit codes: 0 success, 2 bad usage (one line that
names the flag and the remedy), 130 interrupted by Ctrl-C (whatever was done by then is reported first).

A command is a module with `add_arguments(parser)` and `run(args) -> int`; only the one that was asked for is imported.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from torsion import __version__
from torsion.cli.usage import Parser, UsageError

__all__ = ["main"]

INTERRUPTED = 130

# command -> (module, one line for --help)
_COMMANDS = {
    "doctor": ("torsion.cli.doctor", "versions, how each module was built, which back end each op would use and why"),
    "demo": ("torsion.cli.demo", "train a real model with torsion's optimizers beside the ones you use today"),
    "bench": ("torsion.cli.bench", "time the kernels of this machine against what you would run instead"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on `argv` (default: the process's arguments) and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(prog="torsion", description="Fused torque-aware optimizers for PyTorch.")
    parser.add_argument("--version", action="version", version=f"torsion {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="{" + ",".join(_COMMANDS) + "}")
    asked = next((word for word in words if not word.startswith("-")), None)
    for name, (module_name, summary) in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == asked:  # importing only this one keeps `torsion doctor` free of the demo's plotting libraries
            module = importlib.import_module(module_name)
            module.add_arguments(command)
            command.set_defaults(run=module.run, parser=command)
    args, unknown = parser.parse_known_args(words)
    if unknown:
        help_of = f"torsion {args.command}" if args.command else "torsion"
        getattr(args, "parser", parser).error(f"unknown argument {unknown[0]}; see '{help_of} --help'")
    if args.command is None:
        parser.error(f"no command given; try 'torsion doctor' (one of {', '.join(_COMMANDS)})")
    try:
        code: int = args.run(args)
    except UsageError as error:
        args.parser.error(str(error))
    except KeyboardInterrupt:
        print(f"torsion {args.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    return code
