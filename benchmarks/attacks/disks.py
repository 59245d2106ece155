"""A disk that fills while a stage runs: it ends in one line, and the same command later gives the same bytes.

The disk is a small tmpfs. Mounting one takes root.
"""

import os
import random
import shutil
import subprocess
import time
from pathlib import Path

from project import COMMANDS, Template, differences, digests, run, start
from tried import Tried, fault_of

MIB = 2**20
DISK_MIB = 128  # a stage refuses to begin with less than 64 MiB


def mount(folder: Path) -> bool:
    """Mount a tmpfs, and return whether that was possible."""
    folder.mkdir()
    options = f"size={DISK_MIB}m"
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], capture_output=True)
    return done.returncode == 0


def attack(rng: random.Random, folder: Path, template: Template) -> list[Tried]:
    """Run a command on a disk that somebody fills at a random moment. Make room, and run it again."""
    disk = folder / "disk"
    if os.geteuid() or not mount(disk):
        return []
    try:
        return [_attack(rng, disk, template)]
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def _attack(rng: random.Random, disk: Path, template: Template) -> Tried:
    number = rng.randrange(len(COMMANDS))
    case, said = COMMANDS[number][0], f"lgp {' '.join(COMMANDS[number])}"
    project = template.before(number, disk / "project")
    left, after_s = rng.randrange(256 * 1024), rng.uniform(0, 0.9 * template.seconds[number])
    running = start(COMMANDS[number], project)
    time.sleep(after_s)
    filler = disk / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, shutil.disk_usage(disk).free - left))
    first = running.wait()
    filler.unlink()
    fault, output = fault_of(first), first.output
    if fault is None:
        again = run(COMMANDS[number], project)
        fault, output = fault_of(again), first.output + again.output
        if fault is None and again.code:
            fault = "it does not go on when there is room again"
        if fault is None and (others := differences(digests(project), template.expected(number))):
            fault = f"other bytes: {', '.join(others)}"
    if fault is None:
        return Tried(case, told=first.code > 0)
    return Tried(case, f"{fault} ({said}, full after {after_s:.1f} s)", output[-2500:])
