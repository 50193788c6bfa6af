#!/bin/bash
# What only a GPU can say, in one command of at most eight minutes on one card:
#     benchmarks/gpu_day.sh OUT                 # on the machine with the GPU, in the repository's root
#     SMALL=1 benchmarks/gpu_day.sh OUT         # the rehearsal: the same steps on a CPU with small models
#     ONLY="model|interrupted" benchmarks/gpu_day.sh OUT        # some of the steps, by their names
# The machine needs torch and transformers; where it has no network, bring the rest along beforehand:
#     pip download --no-deps -d wheels diffusers==0.42.1 peft==0.21.2 ftfy==6.3.1 wcwidth
# OUT gets throughput.json (table: docs/speed.md), runs.json (start deviation, resume, export), steps.txt, log.txt.
set -u
OUT=$(mkdir -p "$1" && cd "$1" && pwd) START=$SECONDS LIMIT=${LIMIT:-480} SMALL=${SMALL:-0}
PY=${PYTHON:-python} WORK=$(mktemp -d)
export HF_HUB_OFFLINE=1 PYTHONPATH=$PWD
cd "$(dirname "$0")/.."
trap 'rm -rf "$WORK"' EXIT

step() {  # step NAME SECONDS COMMAND: its end and time go to steps.txt, what it prints to log.txt
    local name=$1 limit=$((SMALL ? 10 * $2 : $2)) begun=$SECONDS left=$((LIMIT - SECONDS + START))
    shift 2
    [[ $name =~ ${ONLY:-.} ]] || return
    if [ "$left" -lt 15 ]; then echo "$name: no time left" | tee -a "$OUT/steps.txt"; return; fi
    echo "==== $name: $*" >>"$OUT/log.txt"
    timeout -k 5 $((limit < left ? limit : left)) "$@" >>"$OUT/log.txt" 2>&1
    echo "$name: exit code $? after $((SECONDS - begun)) s" | tee -a "$OUT/steps.txt"
}

throughput() {  # throughput SECONDS LABEL MODEL FLAGS TRAINER ...
    local limit=$1 label=$2 model=$3 flags=$4
    shift 4
    for trainer in "$@"; do
        step "throughput $label $trainer" "$limit" "$PY" -m benchmarks.throughput "$WORK/$model" "$trainer" \
            --label "$label" --out "$OUT/throughput.json" --flags "$SIZES $flags"
    done
}

interrupted() {  # a run that is killed after its first epoch, resumed, exported
    local run=$WORK/runs/$1_$2
    local flags=(--preset tiny-sd15 --model "$WORK/sd15" --lora-targets attention --dtype "$2" --name "$1_$2"
        --runs "$WORK/runs" --reward clipscore --reward-path tiny/clip --eval-rewards= --eval-images 2 --save-every 1
        --epochs 3 --num-prompts 2 --group-size 2 --steps 4 --ratio-tolerance inf --resolution "$PIXELS")
    "$PY" "$1.py" "${flags[@]}" &
    while kill -0 $! 2>/dev/null && [ ! -e "$run/checkpoints/epoch_0001/state.pt" ]; do sleep 0.2; done
    kill -KILL $! 2>/dev/null
    wait $!
    "$PY" "$1.py" --resume "$run" && "$PY" export.py "$run" --format kohya --out "$WORK/$1_$2.safetensors"
    local resumed=$?
    "$PY" - "$run" $resumed "$OUT/runs.json" <<'EOF'
import csv, json, pathlib, sys
run, resumed, out = pathlib.Path(sys.argv[1]), int(sys.argv[2]) == 0, pathlib.Path(sys.argv[3])
rows = list(csv.DictReader((run / "metrics.csv").open()))
deviations = [float(row["ratio/start_deviation"]) for row in rows if row.get("ratio/start_deviation")]
found = json.loads(out.read_text()) if out.exists() else []
found.append({"run": run.name, "epochs": len(rows) - 1, "resumed": resumed, "start_deviation": deviations})
out.write_text(json.dumps(found, indent=1))
EOF
    return $resumed
}
export -f interrupted
export PY WORK OUT

# ---- what to bring, models --------------------------------------------------------------------------------------
WHEELS="-q --no-deps --no-index --find-links wheels diffusers peft ftfy wcwidth"
[ -d wheels ] && step wheels 60 "$PY" -m pip install $WHEELS
if [ "$SMALL" -eq 1 ]; then
    PIXELS=64 SIZES="--num-prompts 1 --group-size 2 --steps 3 --resolution 64"
    MORE="--small --layers 2" FEW=--small SHORT="--epochs 1"
else
    PIXELS=256 MORE="" FEW="" SHORT=""
    SIZES="--num-prompts 2 --group-size 4 --steps 4 --micro-batch-size 4 --decode-batch-size 4 --resolution 512"
fi
export PIXELS
step "model sd15" 60 "$PY" -m benchmarks.random_model sd15 "$WORK/sd15" $MORE &
step "model sd3.5-medium" 90 "$PY" -m benchmarks.random_model sd3.5-medium "$WORK/sd35" $MORE &
step "model flux" 90 "$PY" -m benchmarks.random_model flux "$WORK/flux" --layers 2 $FEW &
# ---- a: the tests that need CUDA ----------------------------------------------------------------------------------
step "tests" 90 "$PY" -m pytest -q -m gpu tests
wait
# ---- b: time and memory -------------------------------------------------------------------------------------------
throughput 60 "SD1.5, bf16" sd15 "--cfg 5 --dtype bfloat16" vmpo grpo first_order_rsm
throughput 60 "SD3.5-M, bf16" sd35 "--cfg 4.5 --dtype bfloat16 --max-sequence-length 128" grpo vmpo awm
LESS="--cfg 4.5 --dtype bfloat16 --max-sequence-length 128 --gradient-checkpointing --offload-rollout"
throughput 60 "SD3.5-M, bf16, checkpointing" sd35 "$LESS" vmpo
throughput 60 "FLUX, 2 + 2 blocks, bf16" flux "--cfg 3.5 --dtype bfloat16 --max-sequence-length 128" grpo
throughput 60 "SD1.5, fp16" sd15 "--cfg 5 --dtype float16" grpo
# ---- c, d: start deviation in half precision; kill, resume, export --------------------------------------------------
for trainer in grpo vmpo awm tempflow_rsm first_order_rsm; do
    step "interrupted $trainer bfloat16" 60 bash -c "interrupted $trainer bfloat16"
done
step "interrupted grpo float16" 60 bash -c "interrupted grpo float16"
# ---- e: learning, with what time is left ---------------------------------------------------------------------------
step "learning" 240 "$PY" benchmarks/learning.py --only grpo awm --presets tiny-sd15 --seeds 0 1 --jobs 4 \
    --out "$WORK/learning" --results "$OUT/learning.json" $SHORT
echo "done after $((SECONDS - START)) s"
