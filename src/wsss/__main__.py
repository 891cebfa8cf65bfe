"""``wsss <command> key=value ...``: the commands under one name."""

from __future__ import annotations

import runpy
import sys

from wsss import __version__

COMMANDS = {
    "prepare": "check a data set, build what is missing, count what it holds",
    "train": "train a method",
    "evaluate": "score a checkpoint under every protocol",
    "report": "one table and picture of finished runs",
}


def main() -> None:
    """Console entry point."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: wsss <command> [key=value ...]\n\ncommands:")
        for name, purpose in COMMANDS.items():
            print(f"  {name:<10} {purpose}")
        print("\n`wsss <command> --help` shows a command's keys and choices.")
        raise SystemExit(0)
    if arguments[0] == "--version":
        print(f"wsss {__version__}")
        raise SystemExit(0)
    if arguments[0] not in COMMANDS:
        print(f"error: no command '{arguments[0]}'. Choose {', '.join(COMMANDS)}.", file=sys.stderr)
        raise SystemExit(2)
    sys.argv = [f"wsss {arguments[0]}", *arguments[1:]]
    runpy.run_module(f"wsss.{arguments[0]}", run_name="__main__", alter_sys=False)


if __name__ == "__main__":
    main()
