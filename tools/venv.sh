# Sourced by demo.sh and test.sh: makes .venv and installs the project once, and again only when its
# dependencies change. Usage: make_venv [EXTRA]
make_venv() {
    local extra=${1:-} python stamp wanted
    python=$(command -v python3.13 || command -v python3.12 || command -v python3.11 || command -v python3 || true)
    [ -n "$python" ] || { echo "error: python3 is missing; install Python 3.11 or newer" >&2; return 2; }
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "error: $python is $("$python" -V 2>&1), expected Python 3.11 or newer" >&2; return 2; }
    wanted=$({ cat pyproject.toml constraints.txt; "$python" -V; } | sha256sum | cut -d' ' -f1)
    stamp=.venv/.installed${extra:+-$extra}
    # with the extra all the rest is there as well
    for have in "$stamp" .venv/.installed-test; do
        [ "$(cat "$have" 2>/dev/null)" = "$wanted" ] && return 0
    done
    echo "Installing into .venv (once, some minutes) ..."
    "$python" -m venv --clear .venv || {
        echo "error: $python -m venv failed; install its venv module (Debian: apt-get install python3-venv)" >&2
        return 2; }
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".${extra:+[$extra]}" -c constraints.txt
    echo "$wanted" > "$stamp"
}
