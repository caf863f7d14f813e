#!/usr/bin/env bash
# The main job end to end on synthetic data whose ceiling is known: HDF5 -> shards -> stage 1 -> stage 2 -> scores ->
# report. Two minutes on a fast core, five on a slow one. Everything lands in data/demo and output/demo, and is made anew
# at each call.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/venv.sh
make_venv
python=.venv/bin/python
# the demo's tensors are small: a second thread costs more than it brings
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

rm -rf data/demo/source
$python tools/make_synthetic.py --out data/demo/source
$python tools/make_shards.py --layout configs/datasets/algonauts2025.yaml --root data/demo/source --out data/demo/shards \
    --features llama_3.2_3b/layers.11 whisper/layers.12 vjepa2/norm --overwrite
$python -m trainer train --config configs/demo.yaml --overwrite
$python -m trainer evaluate output/demo --step best
$python -m trainer report output/demo

$python - <<'PY'
import json
from pathlib import Path

truth = json.loads(Path("data/demo/source/truth.json").read_text())
ceilings = {"s6": truth["seasons"]["6"], "figures": truth["films"]["figures"], "life": truth["films"]["life"]}
print("\nPearson's r, mean over parcels and subjects:")
print(f"{'set':10}{'ceiling':>10}{'stage 1':>10}{'of it':>8}{'stage 2':>10}{'one sample':>12}")
for name, ceiling in ceilings.items():
    r = []
    for stage, estimate in ((1, "mean"), (2, "mean"), (2, "sample")):
        folder = Path(f"output/demo/stage{stage}")
        step = json.loads((folder / "finished.json").read_text())["step"]
        score = json.loads((folder / "scores" / f"step_{step:08d}-{name}-{estimate}.json").read_text())
        r.append(score["pearson_r"])
    print(f"{name:10}{ceiling:10.4f}{r[0]:10.4f}{r[0] / ceiling:8.0%}{r[1]:10.4f}{r[2]:12.4f}")
print("\nThe ceiling is the r of the true signal. One sample lies far below the mean by construction: it carries noise.")
print("Open output/demo/report.html in a browser; its figures are in output/demo/figures.")
PY
