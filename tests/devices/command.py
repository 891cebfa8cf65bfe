"""A command where there is the pretended device.

``python -m tests.devices.command predict device=pretend:0 ...``
"""

from __future__ import annotations

import runpy
import sys

import torch

from tests.devices import pretend


def main() -> None:
    pretend.register()
    # Module.to() otherwise swaps the data inside a parameter, which must be of one class.
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    name, *arguments = sys.argv[1:]
    sys.argv = [f"wsss.{name}", *arguments]
    with pretend.running():
        runpy.run_module(f"wsss.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
