#!/bin/bash
# Make this Debian 12 machine a host with ckptmgr, libvirt and a few sample VMs on KVM: the one
# place that installs and configures.  As root; what is there already stays, a second run is quick.
#
#   vagrant/provision.sh            in the host, in the folder that the tree was copied to
#   vagrant/provision.sh --image    what can be done before it boots; for build-image.sh
#
# CKPTMGR_SAMPLES has the names of the sample VMs to make, if not all.  Fails unless a guest really
# runs on KVM.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

packages=(
    apparmor
    busybox-static
    libvirt-clients
    libvirt-daemon-system
    qemu-system-x86
    qemu-utils
    rsync
)

missing=()
for package in "${packages[@]}"; do
    if [[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) != installed ]]; then
        missing+=("$package")
    fi
done
if [[ ${#missing[@]} != 0 ]]; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -q
    apt-get install -q -y --no-install-recommends -o DPkg::Lock::Timeout=300 "${missing[@]}"
fi

# The rest of the packages, and .venv.
scripts/setup test

# The system's libvirt and its images are root's; in this host everybody is.
install -m 755 /dev/stdin /usr/local/bin/ckptmgr <<END
#!/bin/sh
# ckptmgr as root, from $PWD
[ "\$(id -u)" = 0 ] || exec sudo "\$0" "\$@"
exec $PWD/.venv/bin/ckptmgr "\$@"
END
install -m 755 /dev/stdin /usr/local/bin/sample-vms <<END
#!/bin/sh
[ "\$(id -u)" = 0 ] || exec sudo "\$0" "\$@"
exec $PWD/.venv/bin/python $PWD/vagrant/samples.py "\$@"
END
echo 'export LIBVIRT_DEFAULT_URI=qemu:///system' >/etc/profile.d/libvirt.sh

if [[ ${1:-} == --image ]]; then exit; fi

# --- in the running host ----------------------------------------------------------------------

if ! [[ -c /dev/kvm ]]; then
    modprobe kvm_intel 2>/dev/null || modprobe kvm_amd 2>/dev/null || true
fi
if ! [[ -c /dev/kvm ]]; then
    echo 'provision: no /dev/kvm: this host needs nested KVM (docs/nested-kvm.md)' >&2
    exit 1
fi
.venv/bin/python - <<'END'
import sys
from integration.stand.accel import runs

if not runs("kvm", seconds=60):
    sys.exit("provision: /dev/kvm is there, but a guest does not run on it")
END

if getent passwd vagrant >/dev/null && ! id -nG vagrant | grep -qw libvirt; then
    usermod --append --groups libvirt,kvm vagrant
fi
if ! systemctl -q is-active libvirtd.socket; then systemctl -q enable --now libvirtd.socket; fi
# shellcheck disable=SC2086 -- a list of names
sample-vms start ${CKPTMGR_SAMPLES:-}
