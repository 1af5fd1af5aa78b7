#!/usr/bin/env bash
# The paper's whole path at toy size, on the synthetic set: a detector on single images, VITA on videos, GRAtt-VIS with the
# detector frozen. Each stage starts from the last and is evaluated on the held-out videos.
#
#     benchmarks/stages.sh [iterations of a stage] [data set] [folder of the runs]
set -euo pipefail
cd "$(dirname "$0")/.."
iterations=${1:-500} data=${2:-datasets/synthetic} runs=${3:-runs/stages}

train() {  # stage, then its own flags
    python train.py --stage "$@" --data-root "$data" --output "$runs/$1" --iterations "$iterations" --lr-steps $((iterations * 4 / 5))
    python evaluate.py --data-root "$data" --weights "$runs/$1/last.pt"
}

[ -e "$data" ] || python data.py --root "$data"
train detector --batch 12 --short-sides 80 96 112
train vita --init "$runs/detector/last.pt" --lr 5e-4
train grattvis --init "$runs/vita/last.pt" --lr 5e-4
for stage in detector vita grattvis; do
    python -c "import json, sys; print(f'{sys.argv[1]:10} AP {100 * json.load(open(sys.argv[2]))[\"AP\"]:.1f}')" \
        "$stage" "$runs/$stage/evaluation/metrics.json"
done
