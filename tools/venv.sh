# Sourced by demo.sh and test.sh: makes .venv and installs the project once, and again only when its
# dependencies change. Usage: make_venv [EXTRA]
make_venv() {
    local extra=${1:-} python='' candidate stamp wanted have
    for candidate in python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            python=$candidate
            break
        fi
    done
    if [ -z "$python" ]; then
        echo "error: python3: found $(python3 -V 2>&1 || true), expected Python 3.11 or newer on the PATH" >&2
        return 2
    fi
    wanted=$({ cat pyproject.toml constraints.txt; "$python" -V; } | sha256sum | cut -d' ' -f1)
    stamp=.venv/.installed${extra:+-$extra}
    # with the extra all the rest is there as well
    for have in "$stamp" .venv/.installed-test; do
        [ "$(cat "$have" 2>/dev/null)" = "$wanted" ] && return 0
    done
    echo "Installing into .venv (once, some minutes) ..."
    # an environment that works is kept and added to; half of one is made anew
    .venv/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear .venv || {
        echo "error: $python -m venv failed; install its venv module (Debian: apt-get install python3-venv)" >&2
        return 2; }
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".${extra:+[$extra]}" -c constraints.txt
    echo "$wanted" > "$stamp"
}
