#!/bin/sh
# Make .venv-verl beside .venv, for urlvr_fast.adapters.verl and its tests: verl wants other versions of transformers and antlr4 than vLLM and
# the trainer do. The compiled kernels are those of .venv: they load in any torch. Safe to repeat.
set -eu
cd "$(dirname "$0")/.."

VENV=.venv-verl
STAMP=$VENV/.setup-done
LOG=$VENV/setup.log

torch=$(.venv/bin/python -c 'import torch; print(torch.__version__)')
want="torch $torch $(.venv/bin/python -V) $(cat pyproject.toml scripts/setup-verl.sh | cksum) $(pwd)"
if [ "$(cat $STAMP 2>/dev/null)" = "$want" ]; then echo "setup-verl: $VENV is up to date"; exit 0; fi

echo "setup-verl: making $VENV (two minutes)"
rm -rf $VENV
.venv/bin/python -m venv $VENV
pip_must() {
    $VENV/bin/python -m pip install --disable-pip-version-check "$@" >>$LOG 2>&1 ||
        { tail -n 25 $LOG >&2; echo "setup-verl: pip install $* failed; the whole log is in $LOG" >&2; exit 1; }
}
case $torch in
    *+cpu) index="--extra-index-url https://download.pytorch.org/whl/cpu" ;; # asked where pip's own index has no such build
    *) index="" torch=${torch%%+*} ;;
esac
pip_must "setuptools>=77,<81" wheel
$VENV/bin/python -m pip install --disable-pip-version-check "torch==$torch" >>$LOG 2>&1 || pip_must $index "torch==$torch"
export URLVR_FAST_BUILD=0 # a variable before a shell function need not reach what it runs
pip_must --no-build-isolation -e '.[verl]' pytest pytest-timeout
$VENV/bin/python -c "import urlvr_fast.adapters.verl" >>$LOG 2>&1 || { tail -n 25 $LOG >&2; echo "setup-verl: verl does not import" >&2; exit 1; }
echo "$want" >$STAMP
echo "setup-verl: done"
