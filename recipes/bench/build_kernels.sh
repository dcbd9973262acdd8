#!/usr/bin/env bash
# Builds mamba-ssm and causal-conv1d for the GPU of this machine alone, and installs them into $PYTHON's environment.
#
#     PYTHON=.venv/bin/python bash recipes/bench/build_kernels.sh [DIRECTORY]
#
# DIRECTORY (build/kernels unless given) is looked through for wheels of an earlier build and for source distributions;
# what is missing is fetched from the package index, and the wheels are left there. Some minutes on 16 cores. Never
# fails: what could not be built is said, and the benchmark then uses what there is, and says so.
set -uo pipefail

PYTHON=${PYTHON:-python3}
DIRECTORY=${1:-build/kernels}
MAMBA=2.3.2.post1
CONV=1.7.0

mkdir -p "$DIRECTORY"
DIRECTORY=$(cd "$DIRECTORY" && pwd)

if ! capability=$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())' 2>/dev/null); then
    echo "torch sees no CUDA device here: no kernels are built"
    exit 0
fi
echo "kernels are built for sm_$capability"

# Wheels fit one Python and one torch.
built_for=$("$PYTHON" -c 'import sys, torch; print("cp%d%d-torch%s" % (*sys.version_info[:2], torch.__version__))')
wheels="$DIRECTORY/sm_$capability-$built_for"

works() { "$PYTHON" -c "import torch, $1" >/dev/null 2>&1; }

# PACKAGE VERSION MODULE: install a wheel of an earlier build, or build one.
build() {
    local package=$1 version=$2 module=$3 name=${1//-/_} source status log="$DIRECTORY/$1.log"
    if works "$module"; then echo "$package is installed"; return 0; fi
    if ! ls "$wheels/$name"-*.whl >/dev/null 2>&1; then
        local archives=("$DIRECTORY/$name-$version.tar.gz" "$DIRECTORY/$package-$version.tar.gz")
        [ -f "${archives[0]}" ] || [ -f "${archives[1]}" ] || \
            MAMBA_SKIP_CUDA_BUILD=TRUE CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE \
            "$PYTHON" -m pip download --quiet --no-deps --no-build-isolation --no-binary :all: \
            --dest "$DIRECTORY" "$package==$version" >"$log" 2>&1 || return 1
        source=$(mktemp -d)
        for archive in "${archives[@]}"; do
            [ -f "$archive" ] && tar -xzf "$archive" -C "$source" --strip-components 1
        done
        # Their set-ups name nine GPU architectures; this one alone is many times faster to build.
        sed -i -E -e 's/cc_flag\.append\("(-gencode|arch=[^"]*)"\)/pass/' \
            -e "s/cc_flag = \[\]/cc_flag = [\"-gencode\", \"arch=compute_$capability,code=sm_$capability\"]/" \
            "$source/setup.py"
        if ! grep -q "code=sm_$capability" "$source/setup.py"; then
            echo "the set-up of $package $version names its architectures in a way that this script does not know" >"$log"
            return 1
        fi
        echo "building $package $version (log: $log) ..."
        TORCH_CUDA_ARCH_LIST="${capability%?}.${capability: -1}" MAX_JOBS=${MAX_JOBS:-$(nproc)} \
            MAMBA_FORCE_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE \
            "$PYTHON" -m pip wheel --no-deps --no-build-isolation --wheel-dir "$wheels" "$source" >"$log" 2>&1
        status=$?
        rm -rf "$source"
        [ $status -eq 0 ] || return 1
    fi
    # Its requirements beyond these are for Mamba-3, which is not used.
    "$PYTHON" -m pip install --quiet --no-deps --force-reinstall "$wheels/$name"-*.whl >>"$log" 2>&1 && works "$module"
}

# Without a package index what is installed must do.
"$PYTHON" -m pip install --quiet setuptools wheel ninja packaging einops >/dev/null 2>&1

for line in "causal-conv1d $CONV causal_conv1d" "mamba-ssm $MAMBA mamba_ssm"; do
    # shellcheck disable=SC2086
    if ! build $line; then
        echo "${line%% *} could not be built; the end of its log:"
        tail -n 5 "$DIRECTORY/${line%% *}.log" 2>/dev/null | sed 's/^/    /'
    fi
done

# Mamba-2's kernels are in Triton and need no compiler: recipes/bench/scan_kernels.py finds them in such an installation.
if ! works mamba_ssm && ! "$PYTHON" -m pip show --quiet mamba-ssm 2>/dev/null; then
    archive=$(ls "$DIRECTORY"/mamba[_-]ssm-$MAMBA.tar.gz 2>/dev/null | head -n 1)
    [ -n "$archive" ] && MAMBA_SKIP_CUDA_BUILD=TRUE "$PYTHON" -m pip install --quiet --no-deps --no-build-isolation \
        "$archive" >>"$DIRECTORY/mamba-ssm.log" 2>&1 && echo "mamba-ssm is installed without its CUDA extension"
fi
exit 0
