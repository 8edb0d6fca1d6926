"""Multi-task CLIP: classes per task, and where wanted an adapter per task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedclip.errors import UsageError
from fedclip.models.text_head import TextHead
from fedclip.models.weight_delta import MergeableLora

if TYPE_CHECKING:
    import torch


@dataclass
class Task:
    """A task's classifier, and its adapter's tensors while another is in the model."""

    head: TextHead
    own_adapter: bool
    kept: dict[str, torch.Tensor] | None = None


class ManyTasks(MergeableLora, ABC):
    """A model that changes its classes, and its adapter, by the name of a task."""

    head: str | None
    _tasks: dict[str, Task]
    _task: str | None = None

    @abstractmethod
    def get_parameters(self) -> dict[str, torch.Tensor]:
        """Copy the trainable tensors."""

    @abstractmethod
    def set_parameters(self, state: Mapping[str, Any]) -> None:
        """Put tensors in the place of the trainable ones."""

    def add_task(
        self,
        name: str,
        class_names: Sequence[str],
        templates: Sequence[str] | None = None,
        *,
        own_adapter: bool = False,
    ) -> None:
        """Add a task: its classes, prompts, and with `own_adapter` a separate adapter.

        Such an adapter starts as a copy of the one in the model. The model itself stays as it is
        until `set_task`. Raises `UsageError` for a name that is taken, and for a linear head,
        which knows one set of classes only.
        """
        if self.head == "linear":
            raise UsageError("add_task: a linear head has one set of classes; use head: text")
        if name in self._tasks:
            raise UsageError(f"add_task: there is a task {name!r} already")
        head = self.text_head.like(class_names, templates)
        self._tasks[name] = Task(head, own_adapter, self.get_parameters() if own_adapter else None)

    def set_task(self, name: str | None) -> None:
        """Take a task's classes, and its adapter if it has one; None is what was there before any.

        The adapter of the task that is left is kept as it is now. Raises `UsageError` for an
        unknown name.
        """
        known = self._tasks.get(name) if name is not None else self._without()
        if known is None:
            named = ", ".join(self._tasks) or "none"
            raise UsageError(f"set_task: there is no task {name!r}; known tasks: {named}")
        left = self._tasks[self._task] if self._task is not None else self._without()
        if known is left:
            return
        if left.own_adapter != known.own_adapter or known.own_adapter:
            # Tasks without an adapter of their own share one, which is kept with "no task".
            home = left if left.own_adapter else self._without()
            home.kept = self.get_parameters()
            coming = known if known.own_adapter else self._without()
            if coming.kept is not None:
                self.set_parameters(coming.kept)
        self.text_head = known.head
        self._task = name

    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in the order in which they were added."""
        return tuple(self._tasks)

    def forget_texts(self) -> None:
        """Compute the text features of all tasks anew, as frozen weights have changed."""
        for head in {self._without().head, *(task.head for task in self._tasks.values())}:
            head.forget()

    @property
    def task(self) -> str | None:
        """Name of the task that is set; None where none is."""
        return self._task

    def _without(self) -> Task:
        """What was there before any task: its classes, and the adapter that tasks share."""
        if self._no_task is None:
            self._no_task = Task(self.text_head, own_adapter=False)
        return self._no_task

    _no_task: Task | None = None
