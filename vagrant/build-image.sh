#!/bin/bash
# Build the image of a Debian 12 host with libvirt, QEMU and what ckptmgr needs.
#
#   vagrant/build-image.sh                 into the cache, if it is not there; prints the folder
#   vagrant/build-image.sh --box FILE      and make of it a box for vagrant-libvirt
#   vagrant/build-image.sh --fresh ...     even if it is there
#
# The folder, ~/.cache/ckptmgr/nested/<key of the inputs>, holds host.qcow2 and its vmlinuz and
# initrd.  As root (or with sudo), a few minutes, and network; no loop device, no mounts outside.
# Nothing in it depends on when and where it is built, as far as we know: times are SOURCE_DATE_EPOCH,
# by default that of the last change, and identifiers are fixed, or made when it boots first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

RELEASE=bookworm
SIZE=$((12 << 20)) # KiB; as large as it may grow, the file is sparse
HERE=/opt/ckptmgr  # in the image; also in provision.sh and the Vagrantfile
# A known key, that of every box: vagrant replaces it with one of its own at the first "up".
VAGRANT_KEY='ssh-rsa AAAAB3NzaC1yc2EAAAABIwAAAQEA6NF8iallvQVp22WDkTkyrtvp9eWW6A8YVr+kz4TjGYe7gHzIw+niNltGEFHzD8+v1I2YJ6oXevct1YeS0o9HZyN1Q9qgCgzUFtdOKLv6IedplqoPkcmF0aYet2PkEDo3MlTBckFXPITAMzF8dJSIFo9D8HfdOV0IAdx4O7PtixWKn5y2hMNG0zQPyUecp4pzC6kivAIhyfHilFR61RGL+GPXQ2MWZWFYbAGjyiYJnAmCP3NOTd0jMZEnDkbUvxhMmBYSdETk1rRgm+R4LOzFUGaHqHDLKLX+FIPKcF96hrucXzcWyLbIbEgE98OHlnVYCzRdK8jlqm8tehUc9c9WhQ== vagrant insecure public key'
INPUTS=(
    pyproject.toml
    scripts/constraints.txt
    scripts/setup
    vagrant/build-image.sh
    vagrant/provision.sh
)

box=
fresh=
hook= root=
while [[ $# != 0 ]]; do
    case $1 in
        --box)
            box=$(realpath -m "${2:?a file}")
            shift
            ;;
        --fresh) fresh=yes ;;
        essential_hook | customize_hook) # mmdebstrap calls back
            hook=$1 root=$2
            shift
            ;;
        *)
            echo 'usage: vagrant/build-image.sh [--fresh] [--box FILE]' >&2
            exit 2
            ;;
    esac
    shift
done

cache=${XDG_CACHE_HOME:-$HOME/.cache}/ckptmgr/nested
key=$(sha256sum "${INPUTS[@]}" | sha256sum | cut -c 1-16)
image=$cache/$key

# Debian's packages that this machine needs for it.
tools() {
    local missing=() package
    for package in e2fsprogs mmdebstrap qemu-utils rsync; do
        if [[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) != installed ]]; then
            missing+=("$package")
        fi
    done
    [[ ${#missing[@]} == 0 ]] && return
    echo "build-image: installing ${missing[*]}" >&2
    apt-get update -q >&2
    DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends \
        -o DPkg::Lock::Timeout=300 "${missing[@]}" >&2
}

# Python packages for the image, by the rules of this machine's pip: inside there may be no network
# or another one.  libvirt's and lxml's come from Debian.
wheels() {
    local names
    mapfile -t names < <(.venv/bin/python -c '
import re, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
wanted = project["dependencies"] + project["optional-dependencies"]["test"]
print("setuptools", *(each for each in wanted if not re.match("libvirt-python|lxml>", each)), sep="\n")
')
    .venv/bin/python -m pip download -q --disable-pip-version-check --only-binary=:all: \
        --python-version 3.11 --implementation cp --abi cp311 --abi abi3 --abi none \
        --platform manylinux2014_x86_64 --platform manylinux_2_17_x86_64 \
        --platform manylinux_2_28_x86_64 --platform any \
        -c scripts/constraints.txt -d "$scratch/wheels" "${names[@]}"
}

# What is set up before any package that is not essential: run with the root as its argument.
essential_hook() {
    # one initramfs is enough, that which the kernel's package makes
    mkdir -p "$1/etc/initramfs-tools"
    echo 'update_initramfs=no' >"$1/etc/initramfs-tools/update-initramfs.conf"
}

customize_hook() {
    local root=$1 kernel
    mkdir -p "$root$HERE"
    rsync -a --no-owner --no-group --include='/ckptmgr/***' --include='/integration/***' \
        --include='/scripts/***' --include='/vagrant/***' --include='/pyproject.toml' \
        --include='/README.md' --exclude='*' --exclude=__pycache__ ./ "$root$HERE/"
    cp -r "$scratch/wheels" "$root/var/tmp/wheels"
    chroot "$root" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 \
        SOURCE_DATE_EPOCH="$SOURCE_DATE_EPOCH" PIP_NO_INDEX=1 PIP_FIND_LINKS=/var/tmp/wheels \
        PIP_NO_CACHE_DIR=1 "$HERE/vagrant/provision.sh" --image
    rm -r "$root/var/tmp/wheels"
    # the tree itself comes later, and is that of the day
    find "$root$HERE" -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -r {} +

    chroot "$root" useradd --create-home --shell /bin/bash vagrant
    install -d -m 700 -o 1000 -g 1000 "$root/home/vagrant/.ssh"
    install -m 600 -o 1000 -g 1000 /dev/stdin "$root/home/vagrant/.ssh/authorized_keys" \
        <<<"$VAGRANT_KEY"
    echo 'vagrant ALL=(ALL) NOPASSWD: ALL' >"$root/etc/sudoers.d/vagrant"
    chmod 440 "$root/etc/sudoers.d/vagrant"

    echo ckptmgr >"$root/etc/hostname"
    echo '127.0.0.1 localhost ckptmgr' >"$root/etc/hosts"
    echo 'LABEL=root / ext4 defaults,noatime 0 1' >"$root/etc/fstab"
    printf '%s\n' '[Match]' 'Name=eth0 en*' '[Network]' 'DHCP=yes' \
        >"$root/etc/systemd/network/10-dhcp.network"
    chroot "$root" systemctl -q enable systemd-networkd
    chroot "$root" systemctl -q disable systemd-networkd-wait-online e2scrub_reap apt-daily.timer \
        apt-daily-upgrade.timer
    # each host makes its own
    rm -f "$root"/etc/ssh/ssh_host_*
    mkdir -p "$root/etc/systemd/system/ssh.service.d"
    printf '%s\n' '[Service]' 'ExecStartPre=' \
        "ExecStartPre=/bin/sh -c 'cd /etc/ssh; [ -e ssh_host_ed25519_key ] || ssh-keygen -q -t ed25519 -N \"\" -f ssh_host_ed25519_key'" \
        'ExecStartPre=/usr/sbin/sshd -t' >"$root/etc/systemd/system/ssh.service.d/keys.conf"

    mkdir -p "$root/boot/grub"
    cat >"$root/boot/grub/grub.cfg" <<'END'
serial
terminal_output serial console
linux /vmlinuz root=LABEL=root rw console=tty0 console=ttyS0 net.ifnames=0 quiet
initrd /initrd.img
boot
END
    echo 'search --label root --set=root
configfile ($root)/boot/grub/grub.cfg' >"$root/boot/early.cfg"
    chroot "$root" grub-mkimage -O i386-pc -c /boot/early.cfg -p '(hd0,msdos1)/boot/grub' \
        -o /boot/core.img biosdisk part_msdos ext2 linux normal configfile search \
        search_fs_file search_label serial terminal echo
    # the last, as it takes over the names that are looked up here
    chroot "$root" env DEBIAN_FRONTEND=noninteractive apt-get install -q -y systemd-resolved
    for kernel in vmlinuz initrd.img; do cp -L "$root/$kernel" "$scratch/out/${kernel%.img}"; done
}

# The image itself: a partition table, GRUB before the one partition, a file system from the folder.
write_disk() {
    local root=$1 raw=$2
    # like all times inside
    export E2FSPROGS_FAKE_TIME=$SOURCE_DATE_EPOCH
    find "$root" -newermt "@$SOURCE_DATE_EPOCH" -print0 |
        xargs -0 touch --no-dereference --date="@$SOURCE_DATE_EPOCH"
    truncate -s "$((SIZE + 1024))K" "$raw"
    mke2fs -q -t ext4 -L root -U "$UUID" -d "$root" \
        -E "offset=1048576,lazy_itable_init=1,hash_seed=$UUID" \
        -O '^metadata_csum_seed,^orphan_file' "$raw" "${SIZE}K"
    dd if="$root/usr/lib/grub/i386-pc/boot.img" of="$raw" bs=440 count=1 conv=notrunc status=none
    dd if="$root/boot/core.img" of="$raw" bs=512 seek=1 conv=notrunc status=none
    # one active partition of type Linux from sector 2048, and the table's signature
    .venv/bin/python -c '
import struct, sys
start, sectors = 2048, int(sys.argv[2]) * 2
entry = struct.pack("<B3sB3sII", 0x80, b"\xfe\xff\xff", 0x83, b"\xfe\xff\xff", start, sectors)
with open(sys.argv[1], "r+b") as disk:
    disk.seek(440)
    disk.write(b"ckpt\0\0" + entry.ljust(64, b"\0") + b"\x55\xaa")
' "$raw" "$SIZE"
}

build() {
    local room=$cache
    UUID=7d0c6f0e-7d5b-4f6c-9f0b-0b5c2f1f9a11
    : "${SOURCE_DATE_EPOCH:=$(git log -1 --format=%ct -- "${INPUTS[@]}" 2>/dev/null || true)}"
    : "${SOURCE_DATE_EPOCH:=1767225600}"
    export SOURCE_DATE_EPOCH UUID
    # in memory, if there is plenty: half of the time goes into thousands of small files
    if (($(awk '/^MemAvailable/ {print $2}' /proc/meminfo) > 6 << 20)); then room=/dev/shm; fi
    # what a build that was killed has left; we hold the lock
    scratch=ckptmgr-image-$(cksum <<<"$cache" | cut -d' ' -f1)
    rm -rf "$cache/$scratch"-* "/dev/shm/$scratch"-*
    scratch=$(mktemp -d -p "$room" "$scratch-XXXXXXXX")
    trap 'rm -rf "$scratch"' EXIT
    export scratch
    mkdir "$scratch/out"
    wheels
    mmdebstrap --mode=root --variant=minbase --aptopt='APT::Install-Recommends "false"' \
        --dpkgopt=force-unsafe-io --dpkgopt=force-confold --skip=cleanup/apt/lists \
        --include=ca-certificates,dbus,grub-common,grub-pc-bin,iproute2,kmod,openssh-server \
        --include=linux-image-cloud-amd64,rsync,sudo,systemd-sysv,udev,zstd \
        --essential-hook='vagrant/build-image.sh essential_hook "$1"' \
        --customize-hook='vagrant/build-image.sh customize_hook "$1"' \
        --customize-hook='rm -rf "$1"/var/lib/apt/lists/* "$1"/var/log/*.log "$1"/var/log/apt' \
        "$RELEASE" "$scratch/root"
    write_disk "$scratch/root" "$scratch/raw"
    qemu-img convert -O qcow2 "$scratch/raw" "$scratch/out/host.qcow2"
    rm -rf "$image" "$image.new"
    cp -r "$scratch/out" "$image.new"
    mv "$image.new" "$image"
}

# Images that nobody has asked for in two weeks, unless a host runs on one of them.
forget_old() {
    local old
    find "$cache" -maxdepth 1 -name '*.lock' -mtime +14 | while IFS= read -r old; do
        flock --nonblock "$old" rm -rf "${old%.lock}" "$old" || true
    done
}

make_box() {
    local folder
    folder=$(mktemp -d -p "$cache" box-XXXXXXXX)
    trap "rm -rf '$folder'" EXIT
    cp "$image/host.qcow2" "$folder/box.img"
    printf '{"provider": "libvirt", "format": "qcow2", "virtual_size": %d}\n' \
        $(((SIZE >> 20) + 1)) >"$folder/metadata.json"
    printf '%s\n' 'Vagrant.configure("2") { |config| config.vm.provider(:libvirt) }' \
        >"$folder/Vagrantfile"
    tar -C "$folder" -cf "$1.new" metadata.json Vagrantfile box.img
    mv "$1.new" "$1"
}

if [[ -n $hook ]]; then
    "$hook" "$root"
    exit
fi
if [[ -n $fresh || ! -e $image/host.qcow2 ]]; then
    [[ -x .venv/bin/python ]] || scripts/setup test >&2
    again=(vagrant/build-image.sh ${fresh:+--fresh} ${box:+--box "$box"})
    if [[ $EUID != 0 ]]; then
        exec sudo --preserve-env=HOME,XDG_CACHE_HOME "${again[@]}"
    fi
    if [[ -z ${CKPTMGR_IMAGE_APART:-} ]]; then
        # in mount and pid namespaces: nothing that it starts or mounts outlives it
        export CKPTMGR_IMAGE_APART=yes
        exec setpriv --pdeathsig KILL \
            unshare --mount --pid --fork --kill-child --mount-proc "${again[@]}"
    fi
    mkdir -p "$cache"
    # one build at a time; and none while a host runs on what it would replace
    exec 7>"$cache/building" 8>"$image.lock"
    flock 7
    flock 8
    if [[ -n $fresh || ! -e $image/host.qcow2 ]]; then
        begun=$SECONDS
        tools
        # not as a condition, in which bash goes on after errors
        set +e
        (set -e; build) >"$cache/build.log" 2>&1
        status=$?
        set -e
        if [[ $status != 0 ]]; then
            tail -n 40 "$cache/build.log" >&2
            echo "build-image: failed; all of it is in $cache/build.log" >&2
            exit 1
        fi
        echo "build-image: $image: built in $((SECONDS - begun)) s" >&2
    fi
    forget_old
    exec 7>&- 8>&-
    if [[ -n ${SUDO_UID:-} ]]; then chown -R "$SUDO_UID:$SUDO_GID" "$cache"; fi
fi
touch "$image.lock"
if [[ -n $box ]]; then make_box "$box"; fi
echo "$image"
