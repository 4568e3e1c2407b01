"""Statistics by layer: whose turn it is, when a sampled step begins and ends, and what is known afterwards."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from deepseek_mp.monitor import internals
from deepseek_mp.monitor.alarm_log import AlarmLog, Sampled
from deepseek_mp.monitor.alarms import Limits
from deepseek_mp.monitor.layer_statistics import LayerStatistics
from deepseek_mp.monitor.module_calls import ModuleCalls
from deepseek_mp.monitor.nonfinite import NonFiniteWatch
from deepseek_mp.monitor.observed import Observed
from deepseek_mp.monitor.sampling import Sampling
from deepseek_mp.monitor.subjects import Choice
from deepseek_mp.monitor.summary import summarise
from deepseek_mp.monitor.turn import Turn
from deepseek_mp.monitor.updates import UpdateWatch
from deepseek_mp.monitor.window import Window
from deepseek_mp.ops.own_work import own_work


class Statistics:
    """Samples the layers of one model in turn. Nothing here waits for the device but `layers(wait=True)`."""

    def __init__(self, model: nn.Module, optimizer: Optimizer | None, sampling: Sampling, limits: Limits) -> None:
        self.log = AlarmLog(limits)
        self.is_compiled = False
        """Whether parts of the model were seen to run compiled, where hooks do not run."""
        self._model, self._optimizer, self._sampling = model, optimizer, sampling
        self._choice = Choice(sampling.rows, sampling.seed)
        self._calls = self._next = 0
        """Calls of the model with gradients on, and the subject whose turn is next."""
        self._observed: Observed | None = None
        self._turn: Turn | None = None
        self._watch: NonFiniteWatch | None = None
        self._updates: UpdateWatch | None = None
        self._sampled: Sampled | None = None
        self._ended: Sampled | None = None
        """The step that is being sampled, and the one that was sampled last."""
        self._modules: ModuleCalls | None = None
        self._search = False
        """Whether the next step is to look for the module that made a non-finite value."""
        self._window: Window | None = None
        """Where the last call was counted."""

    # -- steps ----------------------------------------------------------------------------------

    def called(self, *, train: bool, window: Window | None) -> None:
        """The model is about to be called, inside a window if its operations are counted.

        In a window compiled parts run as plain code. Such a step is slow anyway, so one is sampled whenever it is not
        yet, and all modules are watched for non-finite values.
        """
        self.leave_modules()
        if internals.only_traced() or internals.is_transformed() or internals.is_captured():
            return
        with own_work():
            if self._turn is not None and self._turn.backward_seen:
                self._finish()
            self._read()
            if train:
                self._called(window)

    def _called(self, window: Window | None) -> None:
        opened = window is not None and window is not self._window
        self._window = window
        due = opened or self._search or self._calls % self._sampling.every == 0
        self._calls += 1
        if due and (window is not None or not self._runs_compiled()):
            # Where only such steps can be sampled, each is for all layers.
            self._begin(whole=opened or self._search, all_layers=opened and self._runs_compiled())

    def _runs_compiled(self) -> bool:
        self.is_compiled = self.is_compiled or any(internals.is_compiled(module) for module in self._model.modules())
        return self.is_compiled

    def _begin(self, *, whole: bool, all_layers: bool) -> None:
        self._finish()
        if self._updates is not None:
            self._updates.remove()
            self._updates = None
        self._search = False
        if self._observed is None:
            self._observed = Observed.of(self._model, self._sampling)
        seen = self._observed
        count = len(seen.subjects)
        wanted = count if all_layers else min(self._sampling.units, count)
        chosen = [seen.subjects[(self._next + i) % count] for i in range(wanted)]
        self._next = (self._next + len(chosen)) % max(count, 1)
        self._sampled = Sampled(self._calls, tuple(subject.index for subject in chosen), whole)
        watched = seen.places if whole else {subject.module: seen.places[subject.module] for subject in chosen}
        self._watch = NonFiniteWatch(seen.store, watched, self._calls)
        self._turn = Turn(chosen, seen.store, seen.asked, self._choice, seen.ran_in)
        looks = (self._watch.looks(), {self._model: self._watch.look_at_root}, self._turn.looks())
        self._modules = ModuleCalls(self._model, looks)
        if self._optimizer is not None:
            self._updates = UpdateWatch(self._optimizer, chosen, seen.store, self._choice, self._updated)

    def leave_modules(self) -> None:
        """Other calls begin, and hooks were for the one before."""
        if self._modules is not None:
            self._modules.end()
            self._modules = None
        if self._updates is not None and self._updates.is_done:
            self._updates.remove()
            self._updates = None

    def _finish(self) -> None:
        """The step that is sampled, if there is one, is over: copy what it left."""
        sampled, self._sampled = self._sampled, None
        if sampled is None or self._observed is None:
            return
        self._ended = sampled
        if self._turn is not None:
            self._turn.is_open = False
        if self._watch is not None:
            self._watch.close()
        self._turn = self._watch = None
        with own_work():
            self._observed.copies.start(sampled)

    def _updated(self) -> None:
        """The optimizer has stepped: at the end of the sampled step, or, if it waits or skips, after later ones."""
        if self._sampled is not None:
            self._finish()
        elif self._observed is not None:
            with own_work():
                self._observed.copies.start(self._ended)

    def close(self) -> None:
        """Take every hook away; what is known stays."""
        self.leave_modules()
        self._finish()
        if self._updates is not None:
            self._updates.remove()
            self._updates = None

    # -- what is known --------------------------------------------------------------------------

    def layers(self, *, wait: bool) -> dict[str, LayerStatistics]:
        """Statistics by layer: of all that was sampled, or without waiting, of the copies that have arrived."""
        if wait:
            self._finish()
        with own_work():
            self._read()
            seen = self._observed
            if seen is None:
                self._runs_compiled()
                seen = Observed.of(self._model, self._sampling)
            host = seen.store.flat.cpu() if wait or not seen.copies.possible else seen.copies.latest
            return summarise(seen, host, is_compiled=self.is_compiled)

    def _read(self) -> None:
        """Take in the copies that have arrived."""
        seen = self._observed
        if seen is None:
            return
        while (sampled := seen.copies.next()) is not None:
            # A step that all modules were watched in has told what there is to tell.
            self._search = self.log.take_in(seen, sampled) and not sampled.whole
