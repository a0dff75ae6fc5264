"""How long ckptmgr takes beside the bare libvirt calls: ``python -m integration.bench``.

What is compared runs in turns (A B A B), in one run and on one machine, so that a machine that is
busy is busy for both; of each the median counts.  ``docs/performance.md`` has the results.
"""
