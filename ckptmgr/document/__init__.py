"""The checkpoint as XML: libvirt's document, and the store's, which is that and one element more.

    <domaincheckpoint>
      <name>c1</name>
      <description>before the update</description>
      <parent>
        <name>c0</name>
      </parent>
      <creationTime>1700000000</creationTime>
      <disks>
        <disk name='vda' checkpoint='bitmap' bitmap='c1'/>
        <disk name='vdb' checkpoint='no'/>
      </disks>
      <domain type='kvm'>…</domain>
      <ckptmgr:checkpoint xmlns:ckptmgr='urn:ckptmgr:1' engine='libvirt' generation='7'>
        <ckptmgr:disk name='vda' bitmap='c1' node='libvirt-1-format' granularity='65536'
                      persistent='yes' size='67108864' source='/img/a.qcow2' state='recording'>
          <ckptmgr:interval since='c0' map='<sha256>'/>
        </ckptmgr:disk>
        <ckptmgr:disk name='vdb' state='none' reason='raw images cannot keep bitmaps'/>
      </ckptmgr:checkpoint>
    </domaincheckpoint>

An interval without ``map`` is unknown, ``reason`` says why.  A checkpoint whose state is that of
a restore point has its identity as ``<ckptmgr:checkpoint … point='…'>``.  Element and attribute
order are libvirt's (virDomainCheckpointDefFormatInternal), and so is the rule of what is there:
in libvirt's part a disk whose bitmap the image does not hold (a bitmap that is not persistent,
an archived one) stands as ``no``.  ``<domain>`` is kept as it was given, character by character.
"""

from .reading import bitmap_sizes, parse_libvirt, parse_sealed, parse_store
from .writing import format_libvirt, format_request, format_store, with_sizes

__all__ = [
    "bitmap_sizes",
    "format_libvirt",
    "format_request",
    "format_store",
    "parse_libvirt",
    "parse_sealed",
    "parse_store",
    "with_sizes",
]
