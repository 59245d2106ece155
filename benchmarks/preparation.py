"""How long `lgp prepare` takes, against decoding the same files once with Pillow in two processes.

    python benchmarks/preparation.py FOLDER [--size 32] [--storage copy]    # an image folder
    python benchmarks/preparation.py FOLDER --make 60000 [--size 32]        # writes one first, of noisy waves
    python benchmarks/preparation.py FOLDER --make 1000 --size 384 --image-size 224    # JPEG of 80 kB

Both read the same files in turn, after one reading that fills the cache of the disk. Prints a line of JSON: seconds of
both and their ratio; seconds of the same command for ten images, most of which are imports, and the ratio without
these; peak memory of the preparing process and of its largest worker; number and size of the files written. The project
has prepared ten images before, so that its MLflow store exists.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PROCESSES = 2


def make(folder: Path, images: int, size: int) -> None:
    """Write an image folder of 10 classes: PNG below 64 pixels, JPEG above."""
    rng, (_, x) = np.random.default_rng(0), np.mgrid[0:size, 0:size]
    for i in range(images):
        of_class = folder / "train" / str(i % 10)
        if i < 10:
            of_class.mkdir(parents=True)
        waves = 128 + 60 * np.sin(x * (1 + i % 10) / 7 + i)[..., None] + rng.normal(0, 20, (size, size, 3))
        picture = Image.fromarray(waves.clip(0, 255).astype(np.uint8))
        picture.save(of_class / f"{i}.{'png' if size < 64 else 'jpg'}", quality=90)


def decode(files: list[str]) -> int:
    """Decode files to RGB."""
    for file in files:
        with Image.open(file) as image:
            image.convert("RGB")
    return len(files)


def seconds_of_decoding(folder: Path) -> float:
    """Return the time that Pillow takes for all files, in two processes."""
    files = sorted(str(path) for path in (folder / "train").rglob("*.*"))
    chunks = [files[i : i + 256] for i in range(0, len(files), 256)]
    with ProcessPoolExecutor(PROCESSES) as pool:
        list(pool.map(decode, [[], []]))
        started = time.perf_counter()
        assert sum(pool.map(decode, chunks)) == len(files)
        return time.perf_counter() - started


def prepare(project: Path, **data: Any) -> float:
    """Prepare a data source in a project, and return the time of the whole command."""
    values = yaml.safe_load((ROOT / "presets" / "cifar10-cpu.yaml").read_text())
    values["data"] |= {"max_train_images": None, "max_test_images": None, **data}
    (project / "params.yaml").write_text(yaml.safe_dump(values))
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), "prepare"], cwd=project, check=True, stdout=subprocess.DEVNULL
    )
    return time.perf_counter() - started


def main() -> None:
    """Do it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--make", type=int, metavar="IMAGES")
    parser.add_argument("--size", type=int, default=32, help="side of the images that are made")
    parser.add_argument("--image-size", type=int, help="the model's; default: --size")
    parser.add_argument("--storage", default="copy", choices=["copy", "reference"])
    given = parser.parse_args()
    image_size = given.image_size or given.size
    if given.make:
        make(given.folder, given.make, given.size)
    seconds_of_decoding(given.folder)
    project = Path(tempfile.mkdtemp())
    try:
        make(project / "few", 10, given.size)
        few = {"source": "few", "image_size": image_size, "test_share": 0, "val_share": 0}
        prepare(project, **few)
        start = prepare(project, **few)
        decoding = seconds_of_decoding(given.folder)
        source = str(given.folder.resolve())
        preparing = prepare(project, source=source, image_size=image_size, storage=given.storage)
        written = [file for file in (project / "data" / "prepared").iterdir() if file.is_file()]
        found = {
            "decoding_s": round(decoding, 2),
            "prepare_s": round(preparing, 2),
            "ratio": round(preparing / decoding, 2),
            "start_s": round(start, 2),
            "ratio_without_start": round((preparing - start) / decoding, 2),
            "peak_mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024,
            "files": len(written),
            "mib": round(sum(file.stat().st_size for file in written) / 2**20, 1),
        }
        print(json.dumps(found))
    finally:
        shutil.rmtree(project)


if __name__ == "__main__":
    main()
