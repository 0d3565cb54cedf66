"""What gates make of windows: each is judged once, and remembered as long as there is room."""

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from safepatch.diffusion import Components, Spelling, Window, batched, encode_windows, windows
from safepatch.patch.gate import TextGate

MOST = 2048  # windows of one prompt; of one with more, which no encoder reads at once, the gates open
BATCH = 64  # windows judged at a time
SAMPLE: Window = ()  # that tells encoders apart: nothing between a start and an end

K = TypeVar("K")
V = TypeVar("V")


class Memo(Generic[K, V]):
    """What was made of each key, the longest unasked being forgotten first. Threads may share it.

    Args:
        room: for how many keys.
    """

    def __init__(self, room: int) -> None:
        self._room = room
        self._lock = threading.Lock()
        self._made = OrderedDict[K, V]()

    def of(self, keys: Iterable[K], make: Callable[[list[K]], Iterable[V]]) -> dict[K, V]:
        """By key what is known of it, or is made now, of all that are not known at once."""
        distinct = dict.fromkeys(keys)
        with self._lock:
            known = {key: self._made[key] for key in distinct if key in self._made}
        if new := [key for key in distinct if key not in known]:
            known |= zip(new, make(new), strict=True)
        with self._lock:
            for key in distinct:
                self._made[key] = known[key]
                self._made.move_to_end(key)
            while len(self._made) > self._room:
                self._made.popitem(last=False)
        return known

    def forget(self) -> None:
        """Forget all."""
        with self._lock:
            self._made.clear()

    def __len__(self) -> int:
        """How many are remembered."""
        return len(self._made)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Memo[K, V]":
        """A copy remembers nothing."""
        return Memo(self._room)


class WindowGates:
    """Gates that read windows, side by side.

    Args:
        components: whose text encoders read them.
        gates: each with the words of the widest window that each of its groups reads; 0 for none.
        room: for how many windows to remember.

    Attributes:
        widths: of all groups, (gates,).
        memo: of what they made of windows, (gates,) logits each.
    """

    def __init__(self, components: Components, gates: Sequence[tuple[TextGate, tuple[int, ...]]], room: int) -> None:
        self._components = components
        self._gates = [gate for gate, _ in gates]
        self._spelling = Spelling(components.text_encoders()[0][0])
        self._reading = list[Tensor]()
        self.widths = torch.tensor([width for _, widths in gates for width in widths])
        self.memo = Memo[Window, Tensor](room)

    @torch.no_grad()
    def renew(self) -> None:
        """Forget what was made of windows if the text encoders read otherwise since, as with a LoRA or a new token."""
        pairs = self._components.text_encoders()
        added = [torch.tensor(sorted(each.get_added_vocab().values()), dtype=torch.long) for each, _ in pairs]
        reading = [*added, encode_windows(self._components, [SAMPLE]).cpu()]
        for tokens, (_, encoder) in zip(added, pairs, strict=True):
            known = encoder.get_input_embeddings().weight
            if not known.is_meta:  # put aside, layer by layer
                reading.append(known[tokens[tokens < len(known)].to(known.device)].cpu())
        if self._reading and not all(map(torch.equal, reading, self._reading)):
            self._spelling = Spelling(pairs[0][0])
            self.memo.forget()
        self._reading = reading

    def bag(self, tokens: Sequence[int]) -> list[Window]:
        """The distinct windows of a prompt that is given as tokens."""
        return windows(self._spelling.words(tokens), int(self.widths.max()))

    def judged(self, bags: Iterable[Sequence[Window]]) -> dict[Window, Tensor]:
        """By window, what each gate makes of it, (gates,) logits; those of a prompt with more than `MOST` are left."""
        return self.memo.of((window for bag in bags if len(bag) <= MOST for window in bag), self._judge)

    def strongest(self, bag: Sequence[Window], judged: dict[Window, Tensor]) -> Tensor:
        """What each gate makes of the strongest window of one prompt, (gates,) logits."""
        if len(bag) > MOST:
            warnings.warn(f"a prompt has {len(bag)} windows, more than {MOST}; the gates open for it", stacklevel=2)
            return torch.where(self.widths > 0, torch.inf, -torch.inf)
        lowest = torch.full((len(self.widths),), -torch.inf)
        return torch.stack([lowest, *(judged[window] for window in bag)]).amax(0)

    @torch.no_grad()
    def _judge(self, some: Sequence[Window]) -> Tensor:
        """What each gate makes of each window, (windows, gates); nothing of one wider than it was fitted for."""
        order = sorted(range(len(some)), key=lambda i: sum(map(len, some[i])))  # so that few are padded
        logits = torch.empty(len(some), len(self.widths))
        for part in batched(len(some), BATCH):
            rows = [order[i] for i in part]
            states = encode_windows(self._components, [some[i] for i in rows]).float()
            logits[rows] = torch.cat([gate.to(states.device).read(states) for gate in self._gates], dim=1).cpu()
        wide = torch.tensor([len(window) for window in some])[:, None] > self.widths
        return logits.masked_fill(wide, -torch.inf)
