"""check and repair: every kind of mismatch, made for real on running and on stopped machines.

Each is named, ``repair --dry-run`` changes nothing, ``repair`` cures it without stopping the
machine, no difference ever leaves out a byte that differs, and the next checkpoint is exact again.
"""
