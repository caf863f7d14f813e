"""Write the lab files behind the stored run: three people, one of them without a run, one run shown twice."""

from __future__ import annotations

import sys
from pathlib import Path

import h5py
import numpy as np

RUNS = {"a1": 60, "a2": 61, "a3": 59, "a4": 60, "b1": 60, "c1": 60}
SUBJECTS = ("sub-01", "sub-02", "sub-03")


def main(root: Path) -> None:
    rng = np.random.default_rng(20261125)
    mix, streams = rng.standard_normal((4, 12)), {"m1": rng.standard_normal((4, 6)), "m2": rng.standard_normal((4, 4))}
    films = {run: np.cumsum(rng.standard_normal((n, 4)), 0) for run, n in RUNS.items()}
    for latents in films.values():
        latents -= latents.mean(0)
        latents /= latents.std(0)
    for model, weights in streams.items():
        for run, latents in films.items():
            path = root / "features" / model / f"{run}.h5"
            path.parent.mkdir(parents=True, exist_ok=True)
            with h5py.File(path, "w") as file:
                file["layer"] = (latents @ weights).astype("f4")
    for subject in SUBJECTS:
        path = root / "fmri" / subject / f"{subject}_bold.h5"
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path, "w") as file:
            for run, latents in films.items():
                if (subject, run) == ("sub-03", "a2"):
                    continue
                for repeat in (1, 2) if run == "c1" else (None,):
                    noise = rng.standard_normal((len(latents), 12)) * 1.5
                    name = f"task-{run}" + (f"_run-{repeat}" if repeat else "")
                    file[name] = (latents @ mix / 2 + noise).astype("f4")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
