#!/bin/sh
# Make models/demo.gguf and models/demo-mha.gguf again, from nothing to files.
# Needs Debian 12's python3-torch python3-numpy python3-regex python3-matplotlib,
# and gqa-convert in the PATH or named by GQA_CONVERT.
# What is done stays in build/: started again, it goes on where it was stopped.
set -eu
cd "$(dirname "$0")"
models=../../models
python=/usr/bin/python3
convert=${GQA_CONVERT:-gqa-convert}
export OMP_WAIT_POLICY=PASSIVE
mkdir -p build curves "$models"

if [ ! -e build/train.u16 ]; then
    # apt leaves the long descriptions out on a system without a language.
    ls /var/lib/apt/lists/*_Translation-en* >/dev/null 2>&1 ||
        apt-get -o Acquire::Languages=en update
    $python data.py --out build --seed 1
    $python tokenizer.py --build build --vocab 2048
fi

run() { # run NAME PROGRAM OPTIONS...: train build/NAME.pt, once
    name=$1
    program=$2
    shift 2
    [ -e "build/$name.done" ] && return
    nice -n 19 $python "$program" --out "build/$name.pt" --curve "curves/$name.jsonl" \
        --resume "$@"
    touch "build/$name.done"
}

run base train.py --steps 3000 --long-from 2400
# Pooled in float32, so that the heads' means are not rounded before they are trained.
$python export.py build/base.pt build/base.gguf --type f32
$convert --quiet --kv-heads 2 build/base.gguf build/converted.gguf
run gqa uptrain.py --from build/converted.gguf --base-steps 3000 --alpha 0.05 --eval-every 30
run mha-more uptrain.py --from build/base.pt --alpha 0.05 --eval-every 30

$python export.py build/gqa.pt "$models/demo.gguf" --logits
$python export.py build/base.pt "$models/demo-mha.gguf"
$python verify.py "$models/demo.gguf" --heldout build/heldout.u16
$python verify.py "$models/demo-mha.gguf" --heldout build/heldout.u16
$python plot.py
