#!/usr/bin/env bash
# A Docker engine for the container tests: the machine's own where it works; else, as root on Debian, one of our own
# beside the system's, without touching its firewall, sockets or services.
#
#   engine.sh start   make it ready, with the base image; prints export lines for the shell
#   engine.sh stop    remove containers and networks, end what `start` began (images stay for the next time)
#
# Exit code 0: ready. 3: this machine cannot have one, stderr says why. Anything else: it should have worked.
# FEDMASK_ENGINE is the folder of our own engine (default /var/tmp/fedmask-engine; a short path: sockets lie in it).
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin
here=${FEDMASK_ENGINE:-/var/tmp/fedmask-engine}
python=${PYTHON:-python3}
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
image=python:$version-slim
say() { echo "engine.sh: $*" >&2; }
ours() { export DOCKER_HOST=unix://$here/docker.sock DOCKER_CONFIG=$here/config; }
alive() { [ -s "$1" ] && grep -qz "$2" "/proc/$(cat "$1")/cmdline" 2>/dev/null; }

compose_command() {
    if docker compose version >/dev/null 2>&1; then echo "docker compose"
    elif command -v docker-compose >/dev/null; then echo docker-compose
    else return 1; fi
}

need_packages() {
    local missing=() name
    for name in docker.io docker-compose iptables mmdebstrap ca-certificates; do
        dpkg-query -W -f '${Status}' "$name" 2>/dev/null | grep -q 'ok installed' || missing+=("$name")
    done
    ((${#missing[@]})) || return 0
    say "installing ${missing[*]}"
    # The package's own engine stays off: ours runs beside it.
    local policy=/usr/sbin/policy-rc.d made=
    if [ ! -e $policy ]; then made=1; printf '#!/bin/sh\nexit 101\n' >$policy; chmod +x $policy; fi
    apt-get update -qq >&2 && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        -o DPkg::Lock::Timeout=120 "${missing[@]}" >"$here/apt.log" 2>&1 </dev/null || { tail "$here/apt.log" >&2; [ -z $made ] || rm $policy; return 1; }
    [ -z $made ] || rm $policy
}

start_daemon() {
    timeout 20 docker version >/dev/null 2>&1 && return 0
    alive "$here/docker.pid" dockerd || rm -f "$here/docker.pid"
    echo '{}' >"$here/daemon.json"
    setsid nohup dockerd --host "$DOCKER_HOST" --data-root "$here/data" --exec-root "$here/exec" \
        --pidfile "$here/docker.pid" --config-file "$here/daemon.json" --iptables=false --ip6tables=false \
        --ip-forward=false --ip-masq=false --bridge=none --default-address-pool base=10.214.0.0/16,size=24 \
        >"$here/dockerd.log" 2>&1 </dev/null &
    local child=$!
    for _ in $(seq 300); do
        timeout 20 docker version >/dev/null 2>&1 && return 0
        kill -0 $child 2>/dev/null || break
        sleep 0.2
    done
    tail -20 "$here/dockerd.log" >&2
    return 1
}

# The image that the Dockerfile starts from: from a registry, else of Debian's packages and this machine's Python.
base_image() {
    docker image inspect "$image" >/dev/null 2>&1 && return 0
    timeout 60 docker pull -q "$image" >/dev/null 2>&1 && return 0
    say "no registry in reach: making $image from Debian's packages"
    local root=$here/root home extra=
    home=$("$python" -c 'import sys; print(sys.base_prefix)')
    [ "$home" != /usr ] || extra=,python3,python3-venv,python3-pip
    rm -rf --one-file-system "$root"
    local sources=/etc/apt/sources.list.d/debian.sources
    [ -e $sources ] || sources=/etc/apt/sources.list
    mmdebstrap --mode=root --variant=minbase --aptopt='Apt::Install-Recommends "false"' \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' \
        --include="ca-certificates,netbase,tzdata,libssl3,libffi8,libsqlite3-0,libreadline8,libbz2-1.0,liblzma5,zlib1g,libncursesw6,libuuid1,libexpat1,libgdbm6,libnsl2,libtirpc3$extra" \
        "$(. /etc/os-release && echo "$VERSION_CODENAME")" "$root" $sources >"$here/mmdebstrap.log" 2>&1 </dev/null ||
        { tail -20 "$here/mmdebstrap.log" >&2; return 1; }
    if [ "$home" = /usr ]; then
        ln -s /usr/bin/python3 "$root/usr/local/bin/python"
    else
        local parts=("bin/python$version" "lib/python$version" "include/python$version") library
        library=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("INSTSONAME") or "")')
        [ ! -e "$home/lib/$library" ] || [ -z "$library" ] || parts+=("lib/$library")
        tar -C "$home" -c --exclude=__pycache__ --exclude="lib/python$version/site-packages/*" \
            --exclude="lib/python$version/test" --exclude="lib/python$version/config-*" "${parts[@]}" |
            tar -C "$root/usr/local" --no-same-owner -x
        ln -sf "python$version" "$root/usr/local/bin/python3"
        ln -sf python3 "$root/usr/local/bin/python"
        chroot "$root" ldconfig
        chroot "$root" python -m ensurepip >"$here/ensurepip.log" 2>&1
        ln -sf pip3 "$root/usr/local/bin/pip"
    fi
    # What this machine trusts, a build on it trusts as well.
    if compgen -G '/usr/local/share/ca-certificates/*.crt' >/dev/null; then
        mkdir -p "$root/usr/local/share/ca-certificates"
        cp /usr/local/share/ca-certificates/*.crt "$root/usr/local/share/ca-certificates/"
    fi
    chroot "$root" update-ca-certificates >/dev/null 2>&1
    printf '[global]\ncert = /etc/ssl/certs/ca-certificates.crt\n' >"$root/etc/pip.conf"
    rm -f "$root/etc/resolv.conf"
    tar -C "$root" -c --numeric-owner . | docker import --change 'ENV LANG=C.UTF-8' \
        --change 'ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin' \
        --change 'ENV SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt' - "$image" >/dev/null
    rm -rf --one-file-system "$root"
}

# pip's own folder of wheels, if it has one with torch (a CPU build), is served to builds.
serve_wheels() {
    local folder
    folder=$("$python" - <<'PYTHON'
import pathlib, subprocess, sys
found = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
for line in found.splitlines():
    key, _, value = line.partition("=")
    if key.endswith(".find-links"):
        for word in value.strip("'\"").split():
            folder = pathlib.Path(word.removeprefix("file://")).expanduser()
            if "://" not in str(folder) and any(folder.glob("torch-*.whl")):
                print(folder)
                sys.exit()
PYTHON
    )
    [ -n "$folder" ] || return 0
    if ! alive "$here/wheels.pid" http.server; then
        setsid nohup "$python" -m http.server --bind 127.0.0.1 8098 --directory "$folder" \
            >"$here/wheels.log" 2>&1 </dev/null &
        echo $! >"$here/wheels.pid"
        sleep 1
    fi
    alive "$here/wheels.pid" http.server || { tail -2 "$here/wheels.log" >&2; return 1; }
    echo "export PIP_FIND_LINKS=http://127.0.0.1:8098/"
}

start() {
    if timeout 20 docker version >/dev/null 2>&1 && compose=$(compose_command); then
        echo "export COMPOSE='$compose'"
        return
    fi
    if [ "$(id -u)" != 0 ] || ! grep -q '^ID=debian' /etc/os-release 2>/dev/null; then
        say "no working Docker engine with compose here, and only root on Debian can be given one"
        exit 3
    fi
    mkdir -p "$here/config"
    ours
    need_packages
    start_daemon
    base_image
    echo "export DOCKER_HOST='$DOCKER_HOST' DOCKER_CONFIG='$DOCKER_CONFIG' COMPOSE='$(compose_command)' IMAGE_PYTHON=$version"
    serve_wheels
}

stop() {
    [ -d "$here" ] || return 0
    ours
    if alive "$here/docker.pid" dockerd; then
        docker ps -aq | xargs -r timeout 120 docker rm -fv >/dev/null
        docker network prune -f >/dev/null
        kill "$(cat "$here/docker.pid")"
        for _ in $(seq 150); do alive "$here/docker.pid" dockerd || break; sleep 0.2; done
    fi
    if alive "$here/wheels.pid" http.server; then kill "$(cat "$here/wheels.pid")"; fi
    rm -f "$here/wheels.pid"
}

case ${1:-} in start | stop) "$1" ;; *) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" >&2; exit 2 ;; esac
