"""Make a small data set in the layout of Algonauts 2025 whose ceiling of r is known.

    python tools/make_synthetic.py --out DIR [--seed 0] [--tiny]

A few slow latents drive everything. The features contain them linearly, in mixed and rescaled directions, with little
noise. The brain's response is a linear map of the latents convolved with a double-gamma haemodynamic response; each
subject has the shared map plus one of their own. The noise is autocorrelated in time and correlated inside networks,
as a flow should learn it. A second showing of a film has the same response and new noise. `truth.h5` holds the
noise-free response of each scan, `truth.json` its Pearson r with the BOLD: what a perfect encoder would reach.
Season 7 and the films of `ood` come without BOLD, as in the challenge: features, `target_sample_number`, and the truth.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from trainer.errors import InputError, exit_on_input_error
from trainer.run.files import check_writable

TR = 1.49
SUBJECTS = (1, 2, 3, 5)
NETWORKS = 7
LATENTS = 6
LATENT_MEMORY = 0.8
"""Correlation of a latent with itself one TR later: slow, as what happens in a film is."""
NOISE_MEMORY = 0.35
FEATURE_NOISE = 0.1
SHARED = 0.85
"""Part of the response's variance that all subjects share."""
CEILING = 0.28
MISSING = {(2, "s05e20a"), (5, "s04e01a"), (5, "s04e01b")}


@dataclass(frozen=True)
class FakeModel:
    """A feature model of the published table: its folder, data set, the latents it sees and how it is stored."""

    folder: str
    dataset: str
    width: int
    latents: tuple[int, ...]
    dtype: str = "float16"
    layers: int | None = None


MODELS = (
    FakeModel("Llama-3.2-3B", "model.layers.11", 48, (0, 1, 2)),
    FakeModel("whisper", "layers.12.fc2", 32, (2, 3, 4), layers=1),
    FakeModel("qwen2-5_3B", "model.layers.20.post_attention_layernorm", 32, (1, 4, 5), layers=2),
    FakeModel("InternVL3_14B", "language_model.model.layers.30.post_attention_layernorm", 64, (0, 3, 5), "float32"),
    FakeModel("vjepa2_avg_feat", "encoder.layernorm_avg", 24, (0, 2, 5)),
)


@dataclass(frozen=True)
class Stimulus:
    """A run as it was shown: its series, name, how often (0: nobody's BOLD is given), and how long."""

    series: str
    run: str
    showings: int
    n_trs: int

    @property
    def group(self) -> tuple[str, str]:
        """Its line in truth.json: season or film."""
        return ("seasons", str(int(self.run[1:3]))) if self.series == "friends" else ("films", self.run[:-2])


def stimuli(rng: np.random.Generator, tiny: bool) -> list[Stimulus]:
    """The runs: seasons 1 to 6, bourne, wolf, and the twice shown figures and life."""
    if tiny:
        friends = ["s01e01a", "s02e01a", "s03e01a", "s04e01a", "s05e20a", "s06e01a", "s06e01b"]
        films = {"bourne": 1, "wolf": 1, "figures": 1, "life": 1}
    else:
        friends = [f"s{season:02d}e{episode:02d}{part}" for season in (1, 2, 3) for episode in (1, 2) for part in "ab"]
        friends += ["s04e01a", "s04e01b", "s04e13a", "s04e13b", "s05e19a", "s05e19b", "s05e20a", "s05e20b"]
        friends += [f"s06e{episode:02d}{part}" for episode in (1, 2, 3) for part in "ab"]
        films = {"bourne": 5, "wolf": 6, "figures": 2, "life": 2}
    shortest, longest = (40, 60) if tiny else (120, 160)
    named = [("friends", run, 1) for run in friends]
    named += [
        ("movie10", f"{film}{part:02d}", 2 if film in ("figures", "life") else 1)
        for film, parts in films.items()
        for part in range(1, parts + 1)
    ]
    return [Stimulus(*name, int(rng.integers(shortest, longest + 1))) for name in named]


def unseen_stimuli(rng: np.random.Generator, tiny: bool) -> list[Stimulus]:
    """The runs without BOLD: season 7 and films of another kind."""
    episodes, films = (1, ("chaplin",)) if tiny else (2, ("chaplin", "mononoke"))
    named = [("friends", f"s07e{episode:02d}{part}") for episode in range(1, episodes + 1) for part in "ab"]
    named += [("ood", f"{film}{part}") for film in films for part in (1, 2)]
    shortest, longest = (40, 60) if tiny else (120, 160)
    return [Stimulus(*name, 0, int(rng.integers(shortest, longest + 1))) for name in named]


def autoregressive(rng: np.random.Generator, shape: tuple[int, ...], memory: float) -> np.ndarray:
    """AR(1) noise of unit variance along the first axis."""
    noise = rng.standard_normal(shape)
    noise[1:] *= math.sqrt(1 - memory**2)
    for t in range(1, len(noise)):
        noise[t] += memory * noise[t - 1]
    return noise


def haemodynamic_response(tr: float = TR, seconds: float = 30.0) -> np.ndarray:
    """Double gamma with peaks at 6 and 16 s, undershoot 1/6 (the canonical form of SPM), of unit energy."""
    t = np.arange(0, seconds, tr)
    peak, undershoot = (t ** (k - 1) * np.exp(-t) / math.gamma(k) for k in (6, 16))
    response = peak - undershoot / 6
    return np.asarray(response / np.linalg.norm(response))


class Brain:
    """The maps that turn latents into responses and noise into BOLD, fixed by the seed."""

    def __init__(self, rng: np.random.Generator, parcels: int) -> None:
        self.parcels = parcels
        self.network = np.arange(parcels) * 2 * NETWORKS // parcels % NETWORKS
        centre = rng.standard_normal((LATENTS, NETWORKS))
        shared = self._unit(centre[:, self.network] + 0.7 * rng.standard_normal((LATENTS, parcels)))
        own = {s: self._unit(rng.standard_normal((LATENTS, parcels))) for s in SUBJECTS}
        self.maps = {s: self._unit(math.sqrt(SHARED) * shared + math.sqrt(1 - SHARED) * own[s]) for s in SUBJECTS}
        self.loading = rng.uniform(0.5, 0.8, parcels)
        reached = np.clip(CEILING * (1 + 0.35 * rng.standard_normal(parcels)), 0.05, 0.6)
        reached *= CEILING / reached.mean()
        self.gain = reached / np.sqrt(1 - reached**2)
        self.response = haemodynamic_response()
        lags = np.abs(np.subtract.outer(np.arange(len(self.response)), np.arange(len(self.response))))
        self.drive = math.sqrt(self.response @ LATENT_MEMORY**lags @ self.response)

    @staticmethod
    def _unit(columns: np.ndarray) -> np.ndarray:
        return np.asarray(columns / np.linalg.norm(columns, axis=0))

    def signal(self, latents: np.ndarray, subject: int) -> np.ndarray:
        """(T, K) latents -> (T, V) noise-free response."""
        convolved = np.stack([np.convolve(z, self.response)[: len(z)] for z in latents.T], 1) / self.drive
        return convolved @ self.maps[subject] * self.gain

    def noise(self, rng: np.random.Generator, n_trs: int) -> np.ndarray:
        """(T, V): one time course a network, and one a parcel, mixed to unit variance."""
        common = autoregressive(rng, (n_trs, NETWORKS), NOISE_MEMORY)[:, self.network]
        own = autoregressive(rng, (n_trs, self.parcels), NOISE_MEMORY)
        return self.loading * common + np.sqrt(1 - self.loading**2) * own


class Truth:
    """Collects response and BOLD, and gives their r as scores do: per parcel over all TRs, then parcels, subjects."""

    def __init__(self) -> None:
        self.groups: dict[tuple[str, str], dict[int, list[tuple[np.ndarray, np.ndarray]]]] = {}

    def add(self, group: tuple[str, str], subject: int, signal: np.ndarray, bold: np.ndarray) -> None:
        """One scan, cut to the run's common length."""
        for name in (group, ("overall", "")):
            self.groups.setdefault(name, {}).setdefault(subject, []).append((signal, bold))

    def ceilings(self) -> dict[str, object]:
        """What truth.json holds."""
        seasons: dict[str, float] = {}
        films: dict[str, float] = {}
        overall = 0.0
        for (kind, name), subjects in sorted(self.groups.items()):
            r = round(float(np.mean([_pearson(pairs) for pairs in subjects.values()])), 5)
            if kind == "overall":
                overall = r
            else:
                (seasons if kind == "seasons" else films)[name] = r
        return {"tr": TR, "overall": overall, "seasons": seasons, "films": films}


def _pearson(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    signal, bold = (np.concatenate(side) for side in zip(*pairs, strict=True))
    signal, bold = signal - signal.mean(0), bold - bold.mean(0)
    return float(((signal * bold).sum(0) / np.sqrt((signal**2).sum(0) * (bold**2).sum(0))).mean())


def generate(out: Path, seed: int, tiny: bool) -> dict[str, object]:
    """Write the data set below `out` and return the ceilings."""
    rng = np.random.default_rng(seed)
    brain = Brain(rng, 20 if tiny else 200)
    mixing = [_mixing(rng, model) for model in MODELS]
    truth = Truth()
    sessions = {s: iter(rng.permutation(np.arange(1, 400))) for s in SUBJECTS}
    with h5py.File(out / "truth.h5", "w") as response, _Scans(out, brain.parcels) as scans:
        for stimulus in stimuli(rng, tiny):
            latents = autoregressive(rng, (stimulus.n_trs + 2, LATENTS), LATENT_MEMORY)
            for model, mix in zip(MODELS, mixing, strict=True):
                _write_features(out, rng, stimulus, model, latents[: stimulus.n_trs + rng.integers(-2, 3)], mix)
            for showing in range(1, stimulus.showings + 1):
                present = [s for s in SUBJECTS if (s, stimulus.run) not in MISSING]
                for subject in present:
                    n_trs = stimulus.n_trs + (0 if subject == present[0] else int(rng.integers(0, 2)))
                    signal = brain.signal(latents[:n_trs], subject).astype(np.float32)
                    bold = (signal + brain.noise(rng, n_trs)).astype(np.float32)
                    suffix = f"_run-{showing}" if stimulus.showings > 1 else ""
                    scans.write(
                        subject, stimulus, f"ses-{next(sessions[subject]):03d}_task-{stimulus.run}{suffix}", bold
                    )
                    response[f"{subject}/{stimulus.series}_{stimulus.run}{suffix}"] = signal
                    if showing == 1:
                        truth.add(stimulus.group, subject, signal[: stimulus.n_trs], bold[: stimulus.n_trs])
        # with numbers of their own: what was made before them stays what it always was
        _write_unseen(out, np.random.default_rng([seed, 7]), tiny, brain, mixing, response)
    ceilings = truth.ceilings()
    (out / "truth.json").write_text(json.dumps(ceilings, indent=1) + "\n")
    return ceilings


def _mixing(rng: np.random.Generator, model: FakeModel) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Directions (K seen, L * D) of the latents, and each feature's scale and offset, which differ a lot."""
    size = model.width * (model.layers or 1)
    directions = rng.standard_normal((len(model.latents), size)) / math.sqrt(len(model.latents))
    return directions, np.exp(rng.normal(0, 1, size)), rng.normal(0, 2, size)


def _write_unseen(
    out: Path,
    rng: np.random.Generator,
    tiny: bool,
    brain: Brain,
    mixing: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    response: h5py.File,
) -> None:
    """Features, lengths and true responses of the runs without BOLD; the first subject's scans are the longest."""
    wanted: dict[tuple[int, str], dict[str, int]] = {}
    for stimulus in unseen_stimuli(rng, tiny):
        latents = autoregressive(rng, (stimulus.n_trs, LATENTS), LATENT_MEMORY)
        for model, mix in zip(MODELS, mixing, strict=True):
            _write_features(out, rng, stimulus, model, latents[: stimulus.n_trs - rng.integers(0, 2)], mix)
        for subject in SUBJECTS:
            n_trs = stimulus.n_trs - (0 if subject == SUBJECTS[0] else int(rng.integers(0, 2)))
            name = "friends-s7" if stimulus.series == "friends" else stimulus.series
            wanted.setdefault((subject, name), {})[stimulus.run] = n_trs
            signal = brain.signal(latents[:n_trs], subject).astype(np.float32)
            response[f"{subject}/{name.replace('-', '_')}_{stimulus.run}"] = signal
    for (subject, name), numbers in wanted.items():
        folder = out / f"algonauts_2025.competitors/fmri/sub-{subject:02d}/target_sample_number"
        folder.mkdir(exist_ok=True)
        np.save(folder / f"sub-{subject:02d}_{name}_fmri_samples.npy", numbers)  # type: ignore[arg-type]


def _write_features(
    out: Path,
    rng: np.random.Generator,
    stimulus: Stimulus,
    model: FakeModel,
    latents: np.ndarray,
    mixing: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    directions, scale, offset = mixing
    clean = latents[:, list(model.latents)] @ directions
    values = (clean + FEATURE_NOISE * rng.standard_normal(clean.shape)) * scale + offset
    if model.layers:
        values = values.reshape(len(values), model.layers, model.width)
    inner = f"s{int(stimulus.run[1:3])}" if stimulus.series == "friends" else stimulus.run.rstrip("0123456789")
    stem = f"task-{stimulus.run}_video" if stimulus.series == "ood" else f"{stimulus.series}_{stimulus.run}"
    folder = out / "features" / model.folder / stimulus.series / inner
    folder.mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / f"{stem}.h5", "w") as file:
        file[model.dataset] = values.astype(model.dtype)


class _Scans:
    """The BOLD files, one for each subject and series, open while they are filled."""

    def __init__(self, out: Path, parcels: int) -> None:
        self.files: dict[tuple[int, str], h5py.File] = {}
        for subject in SUBJECTS:
            folder = out / f"algonauts_2025.competitors/fmri/sub-{subject:02d}/func"
            folder.mkdir(parents=True)
            for series, end in (("friends", "_desc-s123456"), ("movie10", "")):
                name = f"sub-{subject:02d}_task-{series}_space-MNI152NLin2009cAsym_atlas-Schaefer18"
                name += f"_parcel-{parcels}Par7Net{end}_bold.h5"
                self.files[subject, series] = h5py.File(folder / name, "w")

    def write(self, subject: int, stimulus: Stimulus, dataset: str, bold: np.ndarray) -> None:
        self.files[subject, stimulus.series][dataset] = bold

    def __enter__(self) -> _Scans:
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self.files.values():
            file.close()


def _lines(value: object, name: str = "ceiling of r") -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key != "tr":
                yield from _lines(inner, f"{name}, {key}")
    else:
        yield f"{name}: {value}"


@exit_on_input_error
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="new folder to write")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another data set (default: 0)")
    parser.add_argument("--tiny", action="store_true", help="20 parcels and a dozen short runs, for tests")
    options = parser.parse_args(argv)
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise InputError(options.out, "exists", expected="a new or empty folder", fix="Choose another --out.")
    check_writable(options.out, "Choose another --out.")
    print("\n".join(_lines(generate(options.out, options.seed, options.tiny))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
