#!/usr/bin/env bash
# One command for a rented GPU: correctness first, then figures.
#
#   benchmarks/gpu.sh OUT [SECONDS [options of pytest benchmarks/ ...]]      SECONDS: 1500 unless told
#
# Needs Python 3.11+ with torch, triton, pytest, pytest-benchmark and matplotlib; nothing is fetched. Peers come
# from wheels in .whl/ (peers.txt says which are worth carrying). PYTHON names another interpreter, GATE=FILE
# reuses the test results of an earlier call on the same source, SUITES=hybrid,aoe runs those alone, DEVICE=cpu
# rehearses all of it where there is no GPU. A red op gets no figure, and does not stop the others.
# OUT gets: environment.txt, gpu-tests.json, gpu-*.json, report.md, report.html, logs.tar.gz. All of it lies there
# from the moment it exists, the logs in OUT/logs until the end, so a run that is killed leaves what it has.
set -uo pipefail
(($# >= 1)) || { sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2; }

out=$1; seconds=${2:-1500}; shift $(($# >= 2 ? 2 : 1))
[[ $seconds =~ ^[0-9]+$ ]] || { echo "gpu.sh: SECONDS must be a whole number, got '$seconds'" >&2; exit 2; }
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
gate=${GATE:+$(realpath "$GATE")}
python=${PYTHON:-python3}
[[ $python != */* ]] || python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
device=${DEVICE:-cuda}
work=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$work"' EXIT
export PYTHONUNBUFFERED=1 MPLBACKEND=Agg HF_HUB_OFFLINE=1
left() { echo $((seconds - SECONDS)); }

# An installed package without installing: two folders make one import package (see pyproject.toml).
logs=$out/logs
mkdir -p "$work/repo" "$logs" "$work/site"
cp -rp "$root"/{benchmarks,tests,kernels,vot_kernels,pyproject.toml,README.md} "$work/repo/"
cp -rp "$root/kernels/triton" "$work/repo/vot_kernels/kernels"
cd "$work/repo" || exit 2
if compgen -G "$root/.whl/*.whl" >/dev/null; then
    for wheel in "$root"/.whl/*.whl; do # one by one: a wheel that does not fit must not stop the others
        "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
            --target "$work/site" "$wheel" >>"$logs/wheels.log" 2>&1 || echo "not installed: ${wheel##*/}"
    done
    export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"
fi
[[ $device == cuda ]] || export VOT_GPU_TESTS_DEVICE=$device
"$python" -c 'import sys, torch; torch.ones(1, device=sys.argv[1]).item()' "$device" \
    || { echo "gpu.sh: $python cannot use the device $device, see above" >&2; exit 3; }

{
    date -u +%FT%TZ
    git -C "$root" rev-parse HEAD 2>/dev/null || cat "$root/COMMIT" 2>/dev/null
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm,power.limit --format=csv
    "$python" -m vot_kernels.info
    "$python" -m pip list --format=freeze 2>/dev/null | grep -iE \
        'torch|triton|numpy|flash|xformers|fla|liger|sonic|scatter|transformers|nvidia|cutlass|pytest'
    ls -l "$root/.whl" 2>/dev/null
} >"$out/environment.txt" 2>&1
sed 's/^/  /' "$out/environment.txt" | head -60

echo; echo "== correctness ($(left) s left)"
if [[ -n $gate ]]; then
    cp "$gate" "$out/gpu-tests.json"; tests=0
else
    mkdir -p "$logs/tests"
    "$python" -m benchmarks.gate "$logs/tests/gpu-tests.json" --seconds $((seconds / 4)) --keep-going &
    gate_process=$!
    while kill -0 $gate_process 2>/dev/null; do # a copy of every state, as soon as it is known
        sleep 1; cp "$logs/tests/gpu-tests.json" "$out/" 2>/dev/null
    done
    wait $gate_process; tests=$?
    cp "$logs/tests/gpu-tests.json" "$out/" 2>/dev/null
fi

echo; echo "== figures ($(left) s left)"
name=$device
[[ $device == cpu ]] || name=$("$python" -c 'import re, torch
print(re.sub(r"\W+", "-", "gpu " + torch.cuda.get_device_name().lower()))')
result=$out/$name.json
figures=0; parts=()
# A process for every suite: whatever a peer does to the device ends with it. Early suites may take more than
# an equal share of the time left, and what they leave goes to the later ones.
mapfile -t suites < <(tr ',' '\n' <<<"${SUITES:-hybrid,softmax,linear,aoe,moe,fused,encoder,towers,video}")
for i in "${!suites[@]}"; do
    remaining=$(($(left) - 60)) # for the report
    budget=$((remaining * 8 / (5 * (${#suites[@]} - i) + 3)))
    ((budget > 15)) || { echo "${suites[i]}: no time left"; figures=1; continue; }
    part=$logs/${suites[i]}.json; parts+=("$part")
    timeout --signal=INT --kill-after=20 $((budget + 30)) "$python" -m pytest benchmarks/ --suite "${suites[i]}" \
        --device "$device" --gate "$out/gpu-tests.json" --budget "$budget" --benchmark-quiet \
        --benchmark-json "$part" "$@" 2>&1 | tee "$logs/${suites[i]}.log"
    status=${PIPESTATUS[0]}
    ((status == 0)) || { echo "${suites[i]}: pytest ended with status $status"; figures=1; }
    "$python" -m benchmarks.merge "$result" "${parts[@]}" --command "benchmarks/gpu.sh OUT $seconds $*" || figures=1
done

echo; echo "== report"
if [[ -f $result ]]; then
    "$python" -m benchmarks.report "$result" --out "$work/report" >>"$logs/report.log" 2>&1 \
        || tail -5 "$logs/report.log"
    cp "$work"/report/report.{md,html} "$out/" 2>/dev/null
    cp -r "$work/report" "$logs/report"
fi
tar -C "$out" -czf "$out/logs.tar.gz" logs && rm -r "$logs"
[[ -f $out/report.md ]] && cat "$out/report.md"
ls -l "$out"
((tests == 0)) || { echo "gpu.sh: an op is red, see gpu-tests.json and logs.tar.gz" >&2; exit 1; }
exit "$figures"
