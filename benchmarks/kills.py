"""Kill the graft of this folder at random moments, also while it saves, and compare its final encoder.

Run `python benchmarks/kills.py [--kills 20] [--seed 0]` after `dvc repro`. It trains the graft anew and kills it again
and again (SIGKILL). After every fourth kill the graft runs to its end, and its encoder is compared with the encoder of
`dvc repro`. With digits this takes a quarter of an hour.
"""

import argparse
import hashlib
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

ENCODER = Path("models/graft/encoder/model.safetensors")
RESUME = Path(".lgp/resume/graft-pretrain")
KILLS_PER_RUN = 4


def digest() -> str:
    """Digest the grafted encoder."""
    return hashlib.sha256(ENCODER.read_bytes()).hexdigest()


def newest_state() -> float:
    """Return the time when the last state was written; 0 if there is none."""
    times = [p.stat().st_mtime for p in RESUME.glob("*/state-*.pt") if p.exists()]
    return max(times, default=0.0)


def kill_one(rng: random.Random, while_saving: bool, longest_s: float) -> str:
    """Start the graft, wait for its first state and a random time more, and kill it. Return what it was doing."""
    started = time.time()
    process = subprocess.Popen([sys.executable, "cli.py", "graft"], stdout=subprocess.DEVNULL)
    while newest_state() < started and process.poll() is None:
        time.sleep(0.01)
    until = time.time() + rng.uniform(0, longest_s)
    while time.time() < until or (while_saving and not list(RESUME.glob("*/*.new"))):
        if process.poll() is not None:
            return "not at all: it had ended"
        time.sleep(0.0005)
    torn = bool(list(RESUME.glob("*/*.new")))
    process.kill()
    process.wait()
    return "while saving" if torn else "between states"


def main() -> None:
    """Kill the graft, resume it, and compare its encoder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=25.0, help="seconds from a first state to the kill, at most")
    arguments = parser.parse_args()
    rng, expected = random.Random(arguments.seed), digest()
    shutil.rmtree(RESUME, ignore_errors=True)
    for kill in range(arguments.kills):
        moment = kill_one(rng, while_saving=kill % 2 == 1, longest_s=arguments.longest)
        print(f"kill {kill + 1}: {moment}", flush=True)
        if kill % KILLS_PER_RUN == KILLS_PER_RUN - 1:
            subprocess.run([sys.executable, "cli.py", "graft"], check=True, stdout=subprocess.DEVNULL)
            same = digest() == expected
            print(f"finished: {'the same bytes' if same else 'OTHER BYTES'}", flush=True)
            if not same:
                sys.exit(1)


if __name__ == "__main__":
    main()
