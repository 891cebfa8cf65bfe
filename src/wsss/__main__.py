"""``wsss <command> key=value ...``: the commands under one name."""

from __future__ import annotations

import runpy
import sys

from wsss import __version__
from wsss.cli import check_overrides, hydra_command, quoted_path

COMMANDS = {
    "prepare": "check a data set, build what is missing, count what it holds",
    "train": "train a method",
    "evaluate": "score a checkpoint, or a folder of masks, under every protocol",
    "predict": "masks of your own images, without labels",
    "pseudo_label": "pseudo-labels of labelled images, for a second stage",
    "report": "one page of a finished run; tables and pictures of several",
    "analyse": "figures of a run's CAM pseudo-labels and thresholds",
    "import_checkpoint": "another program's checkpoint into one of ours",
}


#: what Hydra answers from the configuration alone
QUESTIONS = ("-h", "--help", "--hydra-help", "--info", "-i", "--cfg", "-c")


def answer_at_once(command: str, arguments: list[str]) -> None:
    """Help, the composed configuration and mistyped keys, before torch is imported for seconds."""
    if arguments and not arguments[0].startswith("-") and "=" not in arguments[0]:
        return  # a command of its own below this one
    if any(argument.split("=")[0] in QUESTIONS for argument in arguments):
        hydra_command(command, lambda cfg: None)
        raise SystemExit(0)
    if command != "predict":  # which first quotes its paths
        check_overrides(command, list(map(quoted_path, arguments)))


def main() -> None:
    """Console entry point."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: wsss <command> [key=value ...]\n\ncommands:")
        for name, purpose in COMMANDS.items():
            print(f"  {name:<18} {purpose}")
        print("\n`wsss <command> --help` shows a command's keys and choices.")
        raise SystemExit(0)
    if arguments[0] == "--version":
        print(f"wsss {__version__}")
        raise SystemExit(0)
    if arguments[0] not in COMMANDS:
        print(f"error: no command '{arguments[0]}'. Choose {', '.join(COMMANDS)}.", file=sys.stderr)
        raise SystemExit(2)
    sys.argv = [f"wsss {arguments[0]}", *arguments[1:]]
    answer_at_once(arguments[0], arguments[1:])
    # As `python -m wsss.<command>` does: Lightning starts the ranks of other devices by that name.
    runpy.run_module(f"wsss.{arguments[0]}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
