"""Operations that are killed at a chosen step, and what must be true afterwards.

``boundaries``  the steps at which a process can be struck, counted
``warm``        a process that has imported everything and forks one child for each operation
``scene``       a machine with its checkpoints, and what must come out of every diff
``scenarios``   the operations, and what each needs before it
"""

from .boundaries import END, Victim
from .scene import Scene, Shape
from .warm import Outcome, Task, Warm

__all__ = ["END", "Outcome", "Scene", "Shape", "Task", "Victim", "Warm"]
