"""The hook that libvirt calls when a domain stops and starts: other tools' reverts branch, too.

libvirt calls ``prepare begin`` between the old QEMU's exit, when the bitmaps are in the images and
whole, and the start of the one that loads the snapshot, which QEMU refuses while there are any.
Just then the bitmaps are read and taken out; the next command does what needs libvirt, which a
hook must not call.

    script        the shell script that libvirt runs: it decides in milliseconds that a start is an
                  ordinary one
    installation  putting it in libvirt's folder, and removing it
    departure     what is done at a revert
"""
