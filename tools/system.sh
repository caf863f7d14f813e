# Sourced by test.sh: installs the Debian packages whose commands are missing. Usage: install_commands WORD ..., where a
# word is COMMAND, or COMMAND=PACKAGE where the package has another name. Only apt-get, only what is missing, only as
# root or by sudo without a password.
install_commands() {
    local word missing=() sudo=() PATH=$PATH:/usr/sbin
    for word in "$@"; do
        command -v "${word%%=*}" >/dev/null || missing+=("${word#*=}")
    done
    [ ${#missing[@]} -eq 0 ] && return 0
    if [ "$EUID" -ne 0 ]; then
        sudo=(sudo -n)
        sudo -n true 2>/dev/null || {
            echo "error: --system: ${missing[*]} missing, and neither root nor sudo without a password;" \
                "install by hand: apt-get install ${missing[*]}" >&2
            return 2; }
    fi
    command -v apt-get >/dev/null || {
        echo "error: --system: ${missing[*]} missing, and no apt-get here to install it with" >&2
        return 2; }
    echo "Installing ${missing[*]} (Debian packages) ..."
    "${sudo[@]}" apt-get update -qq
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
}
